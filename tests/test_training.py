"""Trainer, adapters and evaluation, in this process."""

import argparse
import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from conftest import GOLDEN, REPO
from finetune_hf_trainer_ucf101 import lora_config
from golden_util import make_image
from helpers.records import RECORDS, image, record, turn
from helpers.trainers import arguments, loaded, make_trainer
from phi3v import Phi3VConfig
from phi3v.data.collators import GenerationCollator, TrainingCollator
from phi3v.errors import RunError
from phi3v.training import RecipeParser, load_processor, trainer_arguments
from phi3v.training.generation import generate
from phi3v.training.loading import add_adapters
from phi3v.training.metrics import accuracy

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


# ---------------------------------------------------------------- parity


def test_official_trainer_trajectory(tiny_checkpoint, tokenizer_folder, tmp_path):
    """Losses, gradient norms and weights over two epochs are those of the official code."""
    golden = json.loads((GOLDEN / "trainer.json").read_text())
    run, hyper = golden["runs"]["bs1_accum4"], golden["hyper"]
    processor = AutoProcessor.from_pretrained(tokenizer_folder, num_crops=golden["num_crops"])
    records = [
        record(turn(e["user"], e["assistant"], make_image(e["spec"]))) for e in golden["examples"]
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    before = snapshot(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            num_train_epochs=hyper["epochs"],
            learning_rate=hyper["lr"],
            adam_beta1=hyper["betas"][0],
            adam_beta2=hyper["betas"][1],
            adam_epsilon=hyper["eps"],
            weight_decay=hyper["wd"],
            warmup_steps=hyper["warmup_steps"],
            lr_scheduler_type=hyper["scheduler"],
            seed=hyper["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
        ),
        data_collator=TrainingCollator(processor),
        train_dataset=records,
    )
    # The official forward takes no num_items_in_batch: its Trainer averages micro-batches.
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == len(run["log"]) == 4
    for ours, official in zip(logged, run["log"], strict=True):
        assert ours["loss"] == pytest.approx(official["loss"], abs=2e-4)
        assert ours["grad_norm"] == pytest.approx(official["grad_norm"], rel=1e-3)
    after = snapshot(model)
    for name, distance in run["delta_l2"].items():
        # RMSNorm weights were decayed by the old Trainer; k_proj's bias moves by noise alone.
        if "layernorm" not in name and not name.endswith(("k_proj.bias", "model.norm.weight")):
            moved = (after[name] - before[name]).norm().item()
            assert moved == pytest.approx(distance, rel=5e-3, abs=1e-6), name


@pytest.mark.parametrize(("frozen", "key"), [(False, "full"), (True, "full_freeze")])
def test_lora_modules_of_the_real_model(frozen, key):
    """Adapters sit on the official modules, under their names, with as many parameters."""
    golden = json.loads((GOLDEN / "keys_lora_full.json").read_text())[key]
    args = RecipeParser("").parse_args(["--use_lora"] + ["--freeze_vision_model"] * frozen)
    with torch.device("meta"):
        config = Phi3VConfig.from_pretrained(GOLDEN / "config_full.json")
        model = AutoModelForCausalLM.from_config(config)
        model.model.vision_embed_tokens.requires_grad_(not frozen)
        model = add_adapters(model, lora_config(args))
    suffix = ".lora_A.default"
    modules = {
        name.removeprefix("base_model.model.").removesuffix(suffix)
        for name, _ in model.named_modules()
        if name.endswith(suffix)
    }
    assert modules == set(golden["lora_modules"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == golden["trainable_params"]
    peft_config = model.peft_config["default"]
    assert peft_config.r == golden["rank"] and peft_config.lora_alpha == golden["alpha"]


# ---------------------------------------------------------------- what is trained


def is_vision(name: str) -> bool:
    return "vision_embed_tokens" in name


@pytest.mark.parametrize(
    "flags",
    [(), ("--freeze_vision_model",), ("--bf16",)],
    ids=["full", "frozen", "bf16"],
)
def test_full_finetuning_changes_what_it_should(demo_checkpoint, tmp_path, flags):
    """Every trained tensor moves, the frozen vision model and CLIP's unused tail do not."""
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path, *flags))
    before = snapshot(trainer.model)
    trainer.train()
    frozen = "--freeze_vision_model" in flags
    for name, tensor in trainer.model.named_parameters():
        unused = ".encoder.layers.2." in name or "post_layernorm" in name
        still = unused or (frozen and is_vision(name))
        assert tensor.requires_grad != still, name
        assert torch.equal(tensor, before[name]) == still, name


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_lora",),
        ("--use_lora", "--freeze_vision_model"),
        ("--use_qlora",),
        ("--use_dora", "--use_rslora"),
        ("--use_qlora", "--use_dora"),
    ],
    ids=["lora", "lora-frozen", "qlora", "dora", "qlora-dora"],
)
def test_lora_trains_adapters_alone(demo_checkpoint, tmp_path, flags):
    """Only adapters move; the saved adapter alone brings the trained model back."""
    args = arguments(demo_checkpoint, tmp_path, *flags, "--lora_rank", "4")
    trainer = make_trainer(args)
    before = snapshot(trainer.model)
    trainer.train()
    for name, tensor in trainer.model.named_parameters():
        assert tensor.requires_grad == ("lora_" in name), name
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name
        assert not ("--freeze_vision_model" in flags and "lora_" in name and is_vision(name))
    processor = load_processor(args)
    trainer.save_model()
    assert (tmp_path / "preprocessor_config.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    if "--use_qlora" not in flags:
        base = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        batch = TrainingCollator(processor)(RECORDS)
        trainer.model.eval()
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, trainer.model(**batch).logits)


@pytest.mark.parametrize(
    "flags",
    [
        ("--use_lora",),
        ("--use_qlora",),
        ("--use_dora",),
        ("--use_rslora",),
        ("--use_qlora", "--use_dora"),
    ],
    ids=" ".join,
)
def test_merged_model_is_the_adapted_one(demo_checkpoint, tmp_path, flags):
    """merged/ is a full checkpoint; its logits are those of base and adapter together."""
    args = arguments(demo_checkpoint, tmp_path, *flags, "--lora_rank", "4", "--merge_lora")
    trainer = make_trainer(args)
    trainer.train()
    trainer.save_model()
    trainer.merge_adapter()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = TrainingCollator(AutoProcessor.from_pretrained(tmp_path / "merged"))(RECORDS)
    with torch.no_grad():
        ours, expected = merged(**batch).logits, adapted(**batch).logits
        plain = AutoModelForCausalLM.from_pretrained(demo_checkpoint)(**batch).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert (ours - plain).abs().max() > 1e-3, "the adapter changed nothing"


def test_learning_rates_of_their_own(demo_checkpoint, tmp_path):
    """Vision tower, projector and the rest get their rate; weight decay is as the Trainer's."""
    flags = ("--vision_learning_rate", "1e-6", "--projector_learning_rate", "1e-5")
    args = arguments(demo_checkpoint, tmp_path, *flags, "--wd", "0.1")
    trainer = make_trainer(args)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}

    def by_name(key: str) -> dict[str, float]:
        groups = trainer.optimizer.param_groups
        return {names[id(p)]: group[key] for group in groups for p in group["params"]}

    Trainer.create_optimizer(trainer)
    plain = by_name("weight_decay")
    trainer.optimizer = None
    trainer.create_optimizer()
    assert by_name("weight_decay") == plain and set(by_name("betas").values()) == {(0.9, 0.95)}
    rates = by_name("lr")
    assert rates.keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == (1e-6 if "img_processor" in name else 1e-5 if is_vision(name) else 4e-5)
    trainer.train()
    assert set(by_name("initial_lr").values()) == {1e-6, 1e-5, 4e-5}, "training kept the groups"


def test_a_learning_rate_of_zero_is_zero(demo_checkpoint, tmp_path):
    """And not that of the rest: the vision tower stays as it is, all else learns."""
    args = arguments(demo_checkpoint, tmp_path, "--vision_learning_rate", "0", "--wd", "0.1")
    trainer = make_trainer(args)
    before = snapshot(trainer.model)
    trainer.train()
    for name, tensor in trainer.model.named_parameters():
        still = not tensor.requires_grad or "img_processor" in name
        assert torch.equal(tensor, before[name]) == still, name


def test_adapters_start_the_same_in_every_run(demo_checkpoint, tmp_path):
    """The seed covers the adapters' initialisation."""
    args = arguments(demo_checkpoint, tmp_path, "--use_lora")
    first, second = (snapshot(loaded(args)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_qlora_quantises_the_decoder_alone(demo_checkpoint, tmp_path):
    """Four bits for the decoder's layers; vision, projection and head keep their precision."""
    args = arguments(demo_checkpoint, tmp_path, "--use_qlora")
    model = loaded(args)
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 2 * 4
    assert all(".layers." in name and not is_vision(name) for name in packed)


def test_evaluation_does_not_disturb_qlora_gradients(demo_checkpoint, tmp_path):
    """On CPUs, 4-bit weights that generated once must still have right gradients."""
    args = arguments(demo_checkpoint, tmp_path, "--use_qlora")
    batch = TrainingCollator(load_processor(args))(RECORDS)

    def gradients(generate_first: bool) -> dict[str, torch.Tensor]:
        model = loaded(args)
        if generate_first:
            model.eval()
            with torch.no_grad():
                model(input_ids=batch["input_ids"][1:2], use_cache=False)
        model.train()
        model(**batch, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, after_generation = gradients(False), gradients(True)
    assert plain.keys() == after_generation.keys()
    assert sum(grad.norm() > 0 for grad in plain.values()) > 10
    for name, grad in plain.items():
        torch.testing.assert_close(after_generation[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_saved_model_is_the_trained_one(demo_checkpoint, tmp_path):
    """The output folder holds the trained weights bit for bit, and generates with a cache."""
    args = arguments(demo_checkpoint, tmp_path)
    trainer = make_trainer(args)
    trainer.train()
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    trained = trainer.model.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in again.state_dict().items())
    assert again.config.use_cache
    assert AutoProcessor.from_pretrained(tmp_path).image_processor.num_crops == 1


# ---------------------------------------------------------------- memory and speed


@pytest.mark.parametrize("flags", [(), ("--use_lora", "--lora_dropout", "0.1")])
def test_gradient_checkpointing_changes_no_bit(demo_checkpoint, tmp_path, flags):
    """So a resume may turn it on or off: what is computed again, dropout included, is the same."""
    weights = []
    for switch in ("--gradient_checkpointing", "--no-gradient_checkpointing"):
        trainer = make_trainer(arguments(demo_checkpoint, tmp_path, *flags, switch))
        trainer.train()
        weights.append(snapshot(trainer.model))
        assert any(m.gradient_checkpointing for m in decoder_layers(trainer.model)) == (
            switch == "--gradient_checkpointing"
        )
    with_it, without = weights
    assert all(torch.equal(tensor, without[name]) for name, tensor in with_it.items())


def decoder_layers(model: torch.nn.Module) -> list[Phi3DecoderLayer]:
    return [module for module in model.modules() if isinstance(module, Phi3DecoderLayer)]


def train_losses(args: argparse.Namespace) -> tuple[Trainer, list[float]]:
    trainer = make_trainer(args)
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_compiled_layers_train_the_same(demo_checkpoint, tmp_path, monkeypatch):
    """
    With --torch_compile, every layer that runs is traced without a break, with gradient
    checkpointing and adapters; losses stay, and so do the tensors' names. Generation is not traced.
    """
    compiled = []

    def compile_without_compiler(function, **options):
        assert options == {"dynamic": True}
        compiled.append(function.__self__)
        return torch_compile(function, dynamic=True, fullgraph=True, backend="eager")

    torch_compile = torch.compile
    monkeypatch.setattr("torch.compile", compile_without_compiler)
    flags = ("--use_lora", "--lora_rank", "4")
    plain, losses = train_losses(arguments(demo_checkpoint, tmp_path, *flags))
    args = arguments(demo_checkpoint, tmp_path, *flags, "--torch_compile")
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    stats.clear()
    trainer, compiled_losses = train_losses(args)
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    assert len(compiled) == 2 + 3, "the decoder's layers and CLIP's"
    graphs = stats["unique_graphs"]
    assert 0 < graphs <= 4, "layers share what is compiled"
    assert snapshot(trainer.model).keys() == snapshot(plain.model).keys()
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()
    trainer.evaluate()
    assert stats["unique_graphs"] == graphs


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_code_trains_the_same(demo_checkpoint, tmp_path):
    """The compiled code itself, over two optimizer steps with rows of different lengths."""
    _, losses = train_losses(arguments(demo_checkpoint, tmp_path))
    torch._dynamo.reset()
    _, compiled_losses = train_losses(arguments(demo_checkpoint, tmp_path, "--torch_compile"))
    assert len(losses) == 2 and compiled_losses == pytest.approx(losses, rel=1e-4)


# ---------------------------------------------------------------- evaluation


def test_evaluation_file(demo_checkpoint, tmp_path):
    """One entry a sample, in the dataset's order, with its id; the metric; nothing half written."""
    args = arguments(demo_checkpoint, tmp_path, "--max_new_tokens", "3")
    records = [{**one, "id": f"s{i}"} for i, one in enumerate(RECORDS * 2)]

    def metrics(results):
        return {"accuracy": accuracy([r.text for r in results], [r.answers[0] for r in results])}

    trainer = make_trainer(args, records, compute_metrics=metrics)
    numbers = trainer.evaluate(file_name="eval_before.json")
    result = json.loads((tmp_path / "eval_before.json").read_text())
    assert result["accuracy"] == numbers["eval_accuracy"]
    assert trainer.state.log_history[-1]["eval_accuracy"] == result["accuracy"]
    assert result["ids"] == [f"s{i}" for i in range(6)]
    answers = ["digitone", "a longer answer. it has two sentences", "yes"]
    assert result["answers_unique"] == answers * 2
    assert len(result["generated_texts_unique"]) == 6
    assert result["generated_texts_unique"][:3] == result["generated_texts_unique"][3:]
    written = {path.name for path in tmp_path.glob("[!.]*")}
    report = {"report.html", "report.json", "report.png"}
    assert written == {"eval_before.json", "trainer_state.json", *report}


def test_batched_generation_is_generation_one_by_one(demo_checkpoint, tmp_path):
    """The batch size of the evaluation does not change an answer."""
    args = arguments(demo_checkpoint, tmp_path)
    model, processor = loaded(args), load_processor(args)
    records = [*RECORDS, record(turn("Another?", "b", image(color="blue")))]
    answers = []
    for size in ("1", "4"):
        training_args = trainer_arguments(
            arguments(demo_checkpoint, tmp_path, "--eval_batch_size_per_gpu", size)
        )
        choices = ("DigitOne", "DigitTwo")
        answers.append(generate(model, processor, records, training_args, 8, choices))
    for (text, probability), (batched_text, batched) in zip(*answers, strict=True):
        assert text == batched_text and 0 < probability < 1
        assert probability == pytest.approx(batched, abs=1e-5)


def test_probability_of_a_choice(demo_checkpoint, tmp_path):
    """The probability is that of the first of two answers, given that it is one of them."""
    args = arguments(demo_checkpoint, tmp_path)
    model, processor, training_args = loaded(args), load_processor(args), trainer_arguments(args)

    def probability(*choices: str) -> float:
        answers = generate(model, processor, RECORDS[:1], training_args, 3, choices)
        [(_, number)] = answers
        return number

    first, second = probability("DigitOne", "DigitTwo"), probability("DigitTwo", "DigitOne")
    assert first + second == pytest.approx(1) and first != pytest.approx(0.5, abs=1e-6)
    batch = GenerationCollator(processor)(RECORDS[:1])
    with torch.no_grad():
        logits = model(**batch).logits[0, -1]
    ids = [
        processor.tokenizer(t, add_special_tokens=False).input_ids[0]
        for t in ("DigitOne", "DigitTwo")
    ]
    assert logits[ids].softmax(0)[0].item() == pytest.approx(first, abs=1e-5)
    with pytest.raises(RunError, match="begin with the same token"):
        probability("no", "no way")


# ---------------------------------------------------------------- the command line


def test_defaults_of_the_recipe():
    """Every flag has the recipe's default."""
    args = RecipeParser("").parse_args([])
    expected = {
        "model_name_or_path": "microsoft/Phi-3.5-vision-instruct",
        "use_flash_attention": False,
        "bf16": False,
        "use_lora": False,
        "use_qlora": False,
        "output_dir": "./output/",
        "batch_size": 16,
        "batch_size_per_gpu": 1,
        "num_crops": 16,
        "num_train_epochs": 1,
        "learning_rate": 4e-5,
        "wd": 0.01,
        "tqdm": True,
        "lora_rank": 64,
        "lora_alpha_ratio": 2,
        "lora_dropout": 0.0,
        "freeze_vision_model": False,
        "gradient_checkpointing": True,
        "torch_compile": False,
        "use_liger": False,
    }
    assert {name: getattr(args, name) for name in expected} == expected


def test_training_arguments_of_flags(demo_checkpoint, tmp_path):
    """Batches, accumulation, precision and checkpointing follow from the flags."""
    args = arguments(demo_checkpoint, tmp_path, "--batch_size", "12", "--batch_size_per_gpu", "3")
    training_args = trainer_arguments(args)
    expected = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "weight_decay": 0.01,
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 3,
        "fp16": torch.cuda.is_available(),
    }
    assert {name: getattr(training_args, name) for name in expected} == expected


def test_other_training_arguments_pass_through(demo_checkpoint, tmp_path):
    """Any field of TrainingArguments is a flag, and wins over what a recipe sets."""
    flags = ("--optim", "sgd", "--warmup_steps", "7", "--lr_scheduler_type", "cosine")
    flags += ("--max_steps", "3", "--neftune_noise_alpha", "5", "--load_best_model_at_end")
    flags += ("--metric_for_best_model", "accuracy", "--eval_steps", "1", "--save_steps", "1")
    args = arguments(demo_checkpoint, tmp_path, *flags)
    training_args = trainer_arguments(args, optim="adamw_torch_fused", warmup_steps=50)
    assert (training_args.optim, training_args.warmup_steps) == ("sgd", 7)
    assert training_args.lr_scheduler_type == "cosine" and training_args.max_steps == 3
    assert training_args.load_best_model_at_end
    args = arguments(demo_checkpoint, tmp_path, "--resume_from_checkpoint")
    assert trainer_arguments(args, optim="sgd").optim == "sgd"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_to", "nonsense"], "the training arguments: .*nonsense"),
        (["--lr_scheduler_kwargs", "{bad"], "the training arguments: "),
        (["--optim", "galore_adamw"], "--optim galore_adamw: "),
        (["--optim_args", "x"], "--optim adamw_torch_fused: "),
        (["--train_sampling_strategy", "group_by_length"], "--train_sampling_strategy group_by"),
    ],
)
def test_other_arguments_that_fail(demo_checkpoint, tmp_path, flags, message):
    """What transformers says of them becomes one line, whenever it says so."""
    with pytest.raises(RunError, match=message):
        make_trainer(arguments(demo_checkpoint, tmp_path, *flags)).train()


def test_training_with_other_arguments(demo_checkpoint, tmp_path):
    """They reach the training: another optimizer, noise on the embeddings, fewer steps."""
    flags = ("--optim", "sgd", "--neftune_noise_alpha", "5", "--max_steps", "2")
    trainer = make_trainer(arguments(demo_checkpoint, tmp_path, *flags))
    trainer.train()
    assert trainer.state.global_step == 2
    assert type(trainer.optimizer.optimizer) is torch.optim.SGD


def test_dora_and_rslora_are_what_peft_makes_of_them(demo_checkpoint, tmp_path):
    """Magnitudes that are trained; alpha / sqrt(rank) as the scale."""
    flags = ("--use_dora", "--use_rslora", "--lora_rank", "4", "--lora_alpha_ratio", "2")
    model = loaded(arguments(demo_checkpoint, tmp_path, *flags))
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    assert layer.scaling["default"] == 8 / 2
    assert layer.lora_magnitude_vector["default"].weight.requires_grad
    plain = loaded(arguments(demo_checkpoint, tmp_path, "--use_lora", "--lora_rank", "4"))
    layer = plain.base_model.model.model.layers[0].self_attn.o_proj
    assert layer.scaling["default"] == 8 / 4 and not layer.lora_magnitude_vector


def test_inputs_of_adapters_are_not_cast(demo_checkpoint, demo_processor, tmp_path):
    """
    Under autocast, float32 inputs become 16 bits again before the adapter: without PEFT's casts,
    loss and gradients are the same to the last bit. DoRA keeps them, for the norms of its weights.
    """
    model = loaded(arguments(demo_checkpoint, tmp_path, "--use_lora", "--lora_rank", "4"))
    for name, parameter in model.named_parameters():  # bf16 under adapters, as on a GPU
        parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert not any(layer.cast_input_dtype_enabled for layer in layers)
    batch, found = TrainingCollator(demo_processor)(RECORDS), []
    for cast in (False, True):
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    assert len(found[0]) > 2 * len(layers)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    dora = loaded(arguments(demo_checkpoint, tmp_path / "b", "--use_dora", "--lora_rank", "4"))
    assert any(getattr(module, "cast_input_dtype_enabled", False) for module in dora.modules())


@pytest.mark.parametrize("flag", ["--use_qlora", "--use_dora", "--use_rslora"])
def test_flags_that_imply_lora(flag):
    assert RecipeParser("").parse_args([flag]).use_lora


def test_implied_flags(monkeypatch):
    """Flash attention implies bf16."""
    pretend_gpu(monkeypatch, (9, 0))
    assert RecipeParser("").parse_args(["--use_flash_attention"]).bf16


NUMBERS = (
    *("num_crops", "batch_size", "batch_size_per_gpu", "eval_batch_size_per_gpu", "max_length"),
    *("max_new_tokens", "save_total_limit", "pack_length", "eval_steps", "save_steps", "seed"),
    *("lora_rank", "lora_alpha_ratio", "dataloader_num_workers", "num_train_epochs"),
)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_crops", "17"], "--num_crops: must be at least 1 and at most 16, not 17"),
        (["--batch_size", "0"], "--batch_size: must be at least 1"),
        (["--batch_size", "6", "--batch_size_per_gpu", "4"], "divisible by 1 processes x"),
        (["--merge_lora"], "--merge_lora needs --use_lora"),
        (
            ["--vision_learning_rate", "1e-6", "--freeze_vision_model"],
            "have nothing to train under --freeze_vision_model",
        ),
        (["--num_train_epochs", "0"], "--num_train_epochs: must be above 0"),
        (["--use_lora", "--merge_lora", "--eval_only"], "--merge_lora needs --use_lora"),
        *(
            ([f"--{flag}={value}"], f"argument --{flag}: must be ")
            for flag in ("wd", "learning_rate", "vision_learning_rate", "lora_dropout")
            for value in ("nan", "inf", "-inf", "-1")
        ),
        *(([f"--{flag}", "-1"], f"argument --{flag}: must be ") for flag in NUMBERS),
        (["--batch_size", "two"], "argument --batch_size: invalid int value: 'two'"),
        (["--lora_dropout", "1"], "--lora_dropout: must be at least 0 and at most 0.999, not 1"),
        (["--output_dir", ""], "--output_dir '' is no name for a folder"),
        (["--output_dir", "a\udcff"], "--output_dir 'a\\udcff' is no name for a folder"),
        (["--learning_rate", "0"], "--learning_rate: must be above 0"),
        (
            ["--eval_batch_size_per_gpu", "1" + "0" * 20],
            "--eval_batch_size_per_gpu: must be at least 1 and at most",
        ),
        (["--lerning_rate", "1"], "--lerning_rate. Did you mean --learning_rate?"),
        (["--warmup_step=3"], "--warmup_step=3. Did you mean --warmup_steps?"),
        (["--weight_decay", "1"], "--weight_decay is decided by --wd"),
        (["--learning-rate", "1"], "--learning-rate is written --learning_rate here"),
        (["--optim", "adam"], "argument --optim: invalid choice: 'adam'"),
    ],
)
def test_refused_arguments(flags, message, capsys):
    """What cannot work is refused at once, with the flag to change."""
    with pytest.raises(SystemExit) as stopped:
        RecipeParser("").parse_args(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "1.0"}, {"LOCAL_WORLD_SIZE": "x"}])
def test_refused_environments(variables, capsys, monkeypatch):
    """What torchrun sets is an error in one line where something else has set it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        RecipeParser("").parse_args([])
    [line] = capsys.readouterr().err.splitlines()
    [value] = variables.values()
    assert stopped.value.code == 2 and "torchrun" in line and repr(value) in line


def test_torchruns_summary_has_the_message(tmp_path, monkeypatch):
    """A rank's reason is in torch elastic's error record, as text and not as a traceback."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        RecipeParser("").parse_args(["--num_crops", "17"])
    failure = ProcessFailure(1, 0, 2, str(tmp_path / "error.json"))
    summary = str(ChildFailedError("recipe", {1: failure}))
    assert summary.count("--num_crops: must be at least 1") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--deepspeed", "no.json"], "--deepspeed no.json: .*No such file"),
        (["--deepspeed", "README.md"], "--deepspeed README.md: "),
        (["--use_qlora", "--deepspeed", "ds_configs/zero3.json"], "cannot shard 4-bit weights"),
        (["--use_lora", "--merge_lora", "--deepspeed", "ds_configs/zero3.json"], "no rank has"),
        (["--torch_compile", "--deepspeed", "ds_configs/zero3.json"], "cannot be compiled"),
        *(
            (["--deepspeed", json.dumps(config)], f"--deepspeed .*config.json: .*{message}")
            for config, message in (
                (None, ""),
                ([1], ""),
                ({"zero_optimization": {"stage": 7}}, "validation error"),
                ({"zero_optimization": {"stages": 2}}, "validation error"),
                ({"fp16": {"enabled": True}}, "fp16 is decided by the flags"),
                ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu is dec"),
            )
        ),
    ],
)
def test_refused_deepspeed_configs(flags, message, monkeypatch, tmp_path):
    """A config that is none, or that a flag contradicts, ends the run before anything starts."""
    monkeypatch.chdir(REPO)
    [*others, config] = flags
    if not config.endswith((".json", ".md")):
        (tmp_path / "config.json").write_text(config)
        flags = [*others, str(tmp_path / "config.json")]
    args = RecipeParser("").parse_args(flags)
    with pytest.raises(RunError, match=message):
        trainer_arguments(args)


@pytest.mark.parametrize(
    ("gpu", "flags", "message"),
    [
        (None, ["--use_flash_attention"], "needs a GPU"),
        (None, ["--use_liger"], "--use_liger needs a GPU"),
        ((9, 0), ["--use_liger"], "pip install liger-kernel"),
        (None, ["--torch_compile"], "needs a C++ compiler"),
        ((7, 5), ["--bf16"], "needs an Ampere GPU or newer, not T4"),
        ((7, 0), [], 'pip install "torch<2.15" torchvision --index-url https://download.pytorch'),
        ((5, 2), ["--use_lora"], "has no kernels for T4 (compute capability 5.2)"),
    ],
)
def test_refused_hardware(gpu, flags, message, capsys, monkeypatch):
    """So is what the hardware or an absent package cannot do."""
    if gpu:
        pretend_gpu(monkeypatch, gpu)
    monkeypatch.setattr("phi3v.training.arguments.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit):
        RecipeParser("").parse_args(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_hardware_that_has_kernels(capability, monkeypatch):
    """From Turing to Blackwell, whatever was built for the generation serves."""
    pretend_gpu(monkeypatch, capability)
    architectures = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.14.1+cu130
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: architectures)
    assert RecipeParser("").parse_args([])


def test_several_gpus_without_torchrun(capsys, monkeypatch):
    """
    One process on several GPUs is refused with the command to type: under DataParallel, pixels
    would meet other rows' texts.
    """
    pretend_gpu(monkeypatch, (9, 0), count=2)
    monkeypatch.setattr("sys.argv", ["finetune.py", "--output_dir", "a b"])
    with pytest.raises(SystemExit):
        RecipeParser("").parse_args([])
    error = capsys.readouterr().err
    assert "Type: torchrun --nproc_per_node=2 finetune.py --output_dir 'a b'; for one" in error
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0" if name == "RANK" else "2")
    assert RecipeParser("").parse_args([])


def test_a_driver_that_is_too_old(capsys, monkeypatch):
    """A card that CUDA cannot use is an error with its reason, not a run on the CPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)

    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040)")

    monkeypatch.setattr("torch.cuda.init", fail)
    # DeepSpeed has torch ask the driver's library alone whether there is a GPU.
    monkeypatch.setattr("torch.cuda.get_device_name", fail)
    with pytest.raises(SystemExit):
        RecipeParser("").parse_args([])
    error = capsys.readouterr().err
    assert "1 GPUs are visible" in error and "driver on your system is too old" in error


def pretend_gpu(monkeypatch, capability: tuple[int, int], count: int = 1) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "T4")


LAST_COLLECTIVE = """
import os
from pathlib import Path
import torch
import torch.distributed as dist
from phi3v.errors import explain_failures

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
kept = dist.group.WORLD  # as DDP keeps it
for task in Path("/proc/self/task").iterdir():
    if "gloo_runloop" in (task / "comm").read_text():
        os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
explain_failures("out")


def collect():
    dist.all_reduce(torch.ones(3), async_op=True).wait()
    dist.all_gather_object([None], 1)


collect()
print("done")
"""


def test_the_end_waits_for_gloo():
    """
    A run whose last collective's thread is late (here it runs when nothing else does) ends well.
    Python would abort it.
    """
    run = subprocess.run(
        [sys.executable, "-c", LAST_COLLECTIVE], cwd=REPO, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "done\n"), run.stderr

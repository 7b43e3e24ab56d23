"""Batches for training and generation."""

import json
import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoProcessor

from conftest import GOLDEN
from golden_util import make_image, unrle
from helpers.records import RECORDS, image, record, turn
from phi3v.data.collators import GenerationCollator, TrainingCollator

FORWARD = json.loads((GOLDEN / "forward.json").read_text())["cases"]


def answers(processor, batch: dict) -> list[list[str]]:
    """Decoded runs of labels of every row."""
    decoded = []
    for labels in batch["labels"]:
        runs, last = [], False
        for label in labels.tolist():
            if label != -100:
                runs = [*runs, []] if not last else runs
                runs[-1].append(label)
            last = label != -100
        decoded.append([processor.tokenizer.decode(run) for run in runs])
    return decoded


def test_labels_are_every_assistant_turn_and_nothing_else(demo_processor):
    """Each answer is trained with its end; prompts, images and padding are not."""
    batch = TrainingCollator(demo_processor)(RECORDS)
    spoken = [[t["assistant"] for t in row["conversations"]] for row in RECORDS]
    for row, (found, wanted) in enumerate(zip(answers(demo_processor, batch), spoken, strict=True)):
        assert len(found) == len(wanted), row
        for text, answer in zip(found, wanted, strict=True):
            assert text.startswith(f"{answer}<|end|>")
        assert found[-1] == f"{wanted[-1]}<|end|> \n<|endoftext|>"
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])


def test_padding_is_on_the_right(demo_processor):
    """
    Then no mask is needed. The trained <|endoftext|>, which is the padding token too, is a token of
    the row. The Trainer learns ids and lengths.
    """
    assert "attention_mask" not in TrainingCollator(demo_processor)(RECORDS)
    batch = TrainingCollator(demo_processor, for_trainer=True)(RECORDS)
    end = demo_processor.tokenizer.pad_token_id
    assert batch["ids"] == [record["id"] for record in RECORDS]
    assert max(batch["lengths"]) == batch["input_ids"].shape[1]
    for ids, labels, length in zip(
        batch["input_ids"], batch["labels"], batch["lengths"], strict=True
    ):
        assert ids[length - 1] == labels[length - 1] == end != ids[length - 2]
        assert (ids[length:] == end).all() and (labels[length:] == -100).all()


@pytest.mark.parametrize("packed", [False, True])
def test_logits_are_kept_where_the_next_token_has_a_label(demo_processor, packed):
    """Every label but a row's first comes once, at the position before it."""
    batch = TrainingCollator(demo_processor)([RECORDS] if packed else RECORDS)
    (rows, positions), labels = batch["logits_to_keep"], batch["labels"]
    kept = torch.zeros_like(labels, dtype=torch.bool)
    kept[rows, positions] = True
    assert len(rows) == kept.sum() and not kept[:, -1].any()
    assert torch.equal(kept[:, :-1], labels[:, 1:] != -100)
    assert torch.equal(batch["shift_labels"], labels[labels != -100])


@pytest.mark.parametrize("packed", [False, True])
def test_what_the_model_need_not_ask_the_device_for(demo_processor, packed):
    """Where images stand, their sizes, and of a packed row where its samples begin."""
    records = [RECORDS] if packed else RECORDS
    batch = TrainingCollator(demo_processor, for_trainer=True)(records)
    alone = TrainingCollator(demo_processor)(records)
    assert batch["image_sizes"] == alone["image_sizes"].tolist()
    is_image = torch.zeros(batch["input_ids"].numel(), dtype=torch.bool)
    is_image[batch["image_positions"]] = True
    assert torch.equal(
        is_image.view_as(batch["input_ids"]), batch["input_ids"] == demo_processor.image_token_id
    )
    if packed:
        assert batch["cu_seq_lens_q"].diff().tolist() == batch["lengths"]
        assert batch["max_length_q"] == max(batch["lengths"])
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0]
        assert batch["cu_seq_lens_k"][:-1].tolist() == starts.tolist()


def test_training_continues_the_generation_prompt(demo_processor):
    """A record is trained on exactly the prompt that evaluation generates from."""
    training = TrainingCollator(demo_processor, for_trainer=True)(RECORDS)
    generation = GenerationCollator(demo_processor)(RECORDS)
    for row in range(len(RECORDS)):
        prompt = generation["input_ids"][row][generation["attention_mask"][row].bool()]
        trained = training["input_ids"][row, : training["lengths"][row]]
        answer = trained[len(prompt) :]
        assert torch.equal(trained[: len(prompt)], prompt)
        last = RECORDS[row]["conversations"][-1]["assistant"]
        assert demo_processor.tokenizer.decode(answer).startswith(last)
    assert torch.equal(training["pixel_values"], generation["pixel_values"])


def test_generation_is_padded_on_the_left(demo_processor):
    """Every row ends in its generation prompt."""
    batch = GenerationCollator(demo_processor)(RECORDS)
    assistant = demo_processor.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert (batch["input_ids"][:, -1] == assistant).all()
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()


def test_batches_without_images(demo_processor):
    """A text-only batch has no pixel_values at all, or a blank image where that is asked for."""
    for collator in (TrainingCollator, GenerationCollator):
        batch = collator(demo_processor)([RECORDS[1], RECORDS[1]])
        assert "pixel_values" not in batch and "image_sizes" not in batch
        blank = collator(demo_processor, blank_image=True)([RECORDS[1], RECORDS[1]])
        size = demo_processor.image_processor.crop_size["height"]
        assert torch.equal(blank.pop("pixel_values"), torch.zeros(1, 1, 3, size, size))
        assert blank.pop("image_sizes").tolist() == [[0, 0]] and blank.keys() == batch.keys()
        assert collator(demo_processor, blank_image=True)(RECORDS)["image_sizes"].all()


def train_rank(rank: int, checkpoint: Path, folder: Path) -> None:
    """One of two DDP processes: the first one's record has images, the second one's has none."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    collator = TrainingCollator(AutoProcessor.from_pretrained(checkpoint), blank_image=True)
    batch = {**collator([RECORDS[rank]]), "use_cache": False}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    parallel = DistributedDataParallel(model)
    parallel(**batch).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save(grads, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_process_without_images_trains_with_one_that_has_some(demo_checkpoint, tmp_path):
    """Gradients of the two meet, those of the vision tower included, and are what they should."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=train_rank, args=(rank, demo_checkpoint, tmp_path), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    assert [process.exitcode for process in ranks] == [0, 0]
    both, same = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, dtype=torch.float32).train()
    collator = TrainingCollator(AutoProcessor.from_pretrained(demo_checkpoint))
    for one in RECORDS[:2]:
        (model(**collator([one]), use_cache=False).loss / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(both[name], same[name]), name
            torch.testing.assert_close(both[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_do_not_depend_on_their_batch(demo_processor):
    """Images and ids of a row are the same alone and in a batch."""
    collator = TrainingCollator(demo_processor)
    batch, first = collator(RECORDS), 0
    for row, one in enumerate(RECORDS):
        alone = collator([one])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :length], alone["input_ids"][0])
        assert torch.equal(batch["labels"][row, :length], alone["labels"][0])
        images = sum(len(t["images"]) for t in one["conversations"])
        if images:
            assert torch.equal(batch["pixel_values"][first : first + images], alone["pixel_values"])
        first += images
    assert first == len(batch["pixel_values"]) == 5


def test_a_conversation_is_one_prompt(demo_processor):
    """
    Of two turns: the text begins once, and anew behind an image, turns follow each other, and the
    end comes once. Ids are compared below, with the real tokenizer.
    """
    conversation = record(turn("Is this right?", "DigitOne", image()), turn("?", "DigitTwo"))
    batch = TrainingCollator(demo_processor)([conversation])
    ids = [i for i in batch["input_ids"][0].tolist() if i != demo_processor.image_token_id]
    words = [
        word.removeprefix("\u2581")
        for word in demo_processor.tokenizer.convert_ids_to_tokens(ids)
        if word not in ("\u2581", "<0x0A>")
    ]
    assert words == [
        *("<s>", "<|user|>", "<s>", "Is", "this", "right", "?", "<|end|>"),
        *("<|assistant|>", "DigitOne", "<|end|>"),
        *("<|user|>", "?", "<|end|>", "<|assistant|>", "DigitTwo", "<|end|>"),
        "<|endoftext|>",
    ]


@pytest.fixture(scope="module")
def real_processor(tokenizer_folder):
    return AutoProcessor.from_pretrained(tokenizer_folder, num_crops=4)


def test_single_turn_is_the_official_sample(real_processor):
    """With the real tokenizer, ids and labels of a single turn are the official ones."""
    for name in ("single_small", "nlvr2_two_images", "ucf_8_frames", "text_only"):
        case = FORWARD[name]
        user = case["prompt"].removeprefix("<|user|>\n").removesuffix("<|end|>\n<|assistant|>\n")
        user = user.split("|>\n", 1)[-1]
        images = [make_image(spec) for spec in case["images"]]
        real_processor.image_processor.num_crops = case["num_crops"]
        batch = TrainingCollator(real_processor)([record(turn(user, case["answer"], *images))])
        golden = [32044 if token < 0 else token for token in unrle(case["input_ids_rle"][0])]
        assert batch["input_ids"].tolist() == [golden], name
        assert batch["labels"].tolist() == [unrle(case["labels_rle"][0])], name


def test_generation_batch_is_the_official_one(real_processor):
    """So are the ids and the mask of a left-padded generation batch."""
    case = FORWARD["batch2_left_padded_generate"]
    records = [
        record(*[turn(user, answer, *map(make_image, specs)) for user, specs, answer in turns])
        for turns in case["conversations"]
    ]
    real_processor.image_processor.num_crops = case["num_crops"]
    batch = GenerationCollator(real_processor)(records)
    golden = [[32044 if t < 0 else t for t in unrle(row)] for row in case["input_ids_rle"]]
    assert batch["input_ids"].tolist() == golden
    assert batch["attention_mask"].tolist() == [unrle(row) for row in case["attention_mask_rle"]]


def test_multi_turn_with_the_real_tokenizer(real_processor):
    """A conversation is one prompt: one BOS but for those after images, one numbering, one end."""
    conversation = record(turn("What is this?", "A cat.", image()), turn("What colour?", "Red"))
    real_processor.image_processor.num_crops = 1
    batch = TrainingCollator(real_processor)([conversation])
    ids = [token for token in batch["input_ids"][0].tolist() if token != 32044]
    # fmt: off
    assert ids == [
        1, 32010, 29871, 13, 1, 29871, 13, 5618, 338, 445, 29973, 32007, 29871, 13, 32001,
        319, 6635, 29889, 32007, 29871, 13, 32010, 29871, 13, 5618, 12384, 29973, 32007, 29871, 13,
        32001, 4367, 32007, 29871, 13, 32000,
    ]
    # fmt: on
    labels = [label for label in batch["labels"][0].tolist() if label != -100]
    assert labels == [319, 6635, 29889, 32007, 29871, 13, 4367, 32007, 29871, 13, 32000]

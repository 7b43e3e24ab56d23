"""The Trainer of the recipes: evaluation by generation, and runs that lose nothing."""

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch.utils.data import Subset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..data.collators import TrainingCollator
from ..data.mixing import Mixture
from ..data.shard_order import ShardOrder
from ..distributed import print_first
from ..errors import OVERFLOW, RunError, one_line, phase
from ..model.processing_phi3_v import Phi3VProcessor
from . import stopping
from .attention import add_packed_mask
from .by_dataset import DatasetLosses, dataset_metrics
from .card import describe, model_card, push
from .checkpoints import take_over, wait_until_seen
from .generation import generate
from .log import Bar, LogLines
from .merging import merge_adapter
from .metrics import normalise
from .output_folder import LAST_RESULT, OutputFolder
from .throughput import Meter

from peft import PeftModel

# Loss scaling in fp16 starts at 65,536 and halves with every overflow; it recovers when they are
# rare. Below this, nothing is learned.
SMALLEST_LOSS_SCALE = 1
# Steps of fp16 in a row without a finite loss: each is skipped, and lowers the loss scale.
MOST_OVERFLOWS = 10


class Result(NamedTuple):
    """What came back for one record. Answers and text are normalised, see `metrics.py`."""

    id: str
    answers: list[str]  # the accepted ones
    text: str
    probability: float | None  # of the first of two choices, where there are any


class Phi3VTrainer(Trainer):
    """
    A Trainer of conversations with images.

    It evaluates by generating answers, gives the vision model learning rates of its own, measures
    throughput, ends the run at a loss that is not finite, and makes checkpoints that a run can be
    resumed from after any kill. Of a mixture of datasets, it measures each as well as all.

    Args:
        args: from `trainer_arguments`.
        flags: the recipe's flags.
        processing_class: the processor; it is saved with the model.
        compute_metrics: all [`Result`]s of an evaluation to named numbers.
        choices: two answers, for the probability that the model gives to the first of them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        flags: argparse.Namespace,
        processing_class: Phi3VProcessor,
        train_dataset: Sequence,
        eval_dataset: Sequence,
        compute_metrics: Callable[[list[Result]], dict[str, float]],
        choices: tuple[str, str] | None = None,
        **kwargs,
    ):
        self.flags = flags
        # Not the Trainer's processing_class: it would write the tokenizer's end of text into the
        # model's config, which is the official one (transformers 5.23, align_special_tokens).
        self.processor = processing_class
        self.choices = choices
        self.folder = OutputFolder(args.output_dir)
        self.stopping = False
        resumed = Path(args.resume_from_checkpoint or "").name.removeprefix("checkpoint-")
        self.saved_step = int(resumed) if resumed.isdigit() else None  # of the last checkpoint
        self.saved = False  # the trained model
        self.last_generated = (None, None, None)  # step, records, answers
        self.losses: list[tuple[list[str], torch.Tensor]] = []  # of a step's micro-batches
        self.overflows = 0
        datasets = train_dataset.names if isinstance(train_dataset, Mixture) else ()
        self.dataset_losses = DatasetLosses(datasets, args.device)
        # A rank that skips the vision tower would wait for others that run it.
        collator = TrainingCollator(
            processing_class,
            for_trainer=True,
            blank_image=args.world_size > 1,
            datasets=datasets,
        )
        with phase("the training arguments"):  # a tracker or the hub may be asked for
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                compute_metrics=compute_metrics,
                callbacks=[_Steps(self)],
                **kwargs,
            )
        for transformers_own in (PrinterCallback, ProgressCallback):
            self.remove_callback(transformers_own)
        if not args.disable_tqdm:
            self.add_callback(Bar)
        self.add_callback(LogLines)
        if flags.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(flags.early_stopping_patience))
        self.eval_subset = evenly(eval_dataset, flags.eval_samples)
        self.trackers = self._keep_trackers_open()
        self.meter = Meter(self.model, args.device)
        if not flags.eval_only:
            self.settings = take_over(flags, args, self.model, train_dataset)

    # ---- Training ----

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As the Trainer's. SIGTERM to any rank ends the run after a step, with a checkpoint."""
        stopping.listen()
        self.earlier_logs = self.state.log_history  # the Trainer begins a new state
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        summary, text = self.meter.summary()
        self.state.log_history.append({**summary, "step": self.state.global_step})
        print_first(text)
        if self.stopping:
            self._stop()
        return output

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with groups of their own for the vision tower and projector."""
        with phase(f"--optim {self.args.optim.value}"):
            optimizer = super().create_optimizer(model)
        own_rates = {
            ".img_processor.": self.flags.vision_learning_rate,
            ".vision_embed_tokens.": self.flags.projector_learning_rate,
        }
        rates = {}
        for name, parameter in (self.model if model is None else model).named_parameters():
            rates[parameter] = next((own_rates[part] for part in own_rates if part in name), None)
        for group in list(optimizer.param_groups):
            for rate in {rates[parameter] for parameter in group["params"]} - {None}:
                own = [parameter for parameter in group["params"] if rates[parameter] == rate]
                group["params"] = [p for p in group["params"] if rates[p] != rate]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def get_train_dataloader(self):
        with phase(f"--train_sampling_strategy {self.args.train_sampling_strategy}"):
            return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        if not self.flags.streaming:
            return super()._get_train_sampler(train_dataset)
        streams = self.args.world_size * max(1, self.args.dataloader_num_workers)
        batch_size, seed = self.args.per_device_train_batch_size, self.args.seed
        return ShardOrder(self.train_dataset, batch_size, streams, seed)

    def get_batch_samples(self, *args, **kwargs):
        with self.meter.waiting():
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        self.meter.count(inputs)
        ids, _ = inputs.pop("ids"), inputs.pop("lengths")
        add_packed_mask(inputs, self.flags)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append((ids, loss))
        return loss

    def compute_loss(
        self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        datasets = inputs.pop("label_datasets", None)
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if datasets is not None:
            self.dataset_losses.add(outputs["logits"], inputs["shift_labels"], datasets)
        return (loss, outputs) if return_outputs else loss

    def after_step(self) -> None:
        """
        Look at the losses and for SIGTERM, once per optimizer step and together with all ranks.

        Raises:
            RunError: a loss is not finite. In fp16 such a step is skipped, and MOST_OVERFLOWS of
                them in a row end the run.
        """
        losses, self.losses = self.losses, []
        bad = ~torch.stack([loss for _, loss in losses]).isfinite()
        flags = torch.stack([bad.any(), bad.new_tensor(stopping.received())]).int()
        if dist.is_initialized():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        any_bad, self.stopping = map(bool, flags.tolist())
        self.meter.step_done()
        if self.stopping:
            self.control.should_save = self.control.should_training_stop = True
        self.overflows = self.overflows + 1 if any_bad else 0
        if any_bad and not (self.args.fp16 and self.overflows < MOST_OVERFLOWS):
            where = [ids for (ids, _), is_bad in zip(losses, bad.tolist(), strict=True) if is_bad]
            ids = gather_object(where[:1])[0]
            raise RunError(
                f"the loss of step {self.state.global_step} is not finite, in the batch of "
                f"{', '.join(map(repr, ids))}. Look at these samples; if they are as they should "
                "be, lower --learning_rate, or use --bf16 in place of fp16. The checkpoints before "
                "this step are untouched."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.dataset_losses.collect() | self.meter.rates()
            scaler = self.accelerator.scaler  # of fp16 without DeepSpeed, which has its own
            if scaler is not None and scaler.get_scale() < SMALLEST_LOSS_SCALE:
                raise RunError(OVERFLOW)
        with phase(f"--report_to {' '.join(self.args.report_to)}"):
            super().log(logs, start_time)

    def _keep_trackers_open(self) -> list[Callable]:
        """
        What ends each tracker's run (--report_to), after the last evaluation.

        The Trainer ends it with the training, and the evaluation would begin another one in MLflow,
        trackio and TensorBoard, whose first one would lie in the working folder (transformers
        5.23). Can go when trackers take what comes before and after a training into its run.
        """
        ends, kinds = [], tuple(get_reporting_integration_callbacks(self.args.report_to))
        for tracker in self.callback_handler.callbacks:
            if isinstance(tracker, kinds):
                ends.append(tracker.on_train_end)
                tracker.on_train_end = lambda *args, **kwargs: None
            if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
                tracker.logging_dir = str(
                    self.folder.path / "runs" / time.strftime("%b%d_%H-%M-%S")
                )
        return ends

    def _end_trackers(self) -> None:
        for end in self.trackers:
            end(self.args, self.state, self.control, model=self.model)
        self.trackers = []

    def _stop(self) -> None:
        self._end_trackers()
        stopping.stop(
            f"Stopped by SIGTERM after step {self.state.global_step} of {self.state.max_steps}; a "
            "checkpoint is saved."
        )

    # ---- Evaluation ----

    def evaluate(
        self,
        eval_dataset: Sequence | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        file_name: str | None = None,
    ) -> dict[str, float]:
        """
        Generate an answer to the last question of every record, measure, log, and write `file_name`
        into the output folder: metrics, of a mixture those of each dataset, ids, answers and texts.

        The last assistant turn is the answer, or what is in `answers` where a record has several
        accepted ones.

        Args:
            file_name: `eval_step_<n>.json` by default, of --eval_samples.

        Returns:
            The metrics, their names prefixed, on every rank.

        Raises:
            SystemExit: SIGTERM came; nothing is written. In training, a checkpoint is saved.
        """
        own = self.eval_dataset if file_name else self.eval_subset
        records = own if eval_dataset is None else eval_dataset
        file_name = file_name or f"eval_step_{self.state.global_step}.json"
        if self.is_in_train and self.control.should_save:
            # Before a long evaluation, so that a kill cannot cost the checkpoint.
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        start = time.perf_counter()
        generated = self._generate(records, file_name)
        if generated is None:
            if not self.is_in_train:
                stopping.stop(f"{file_name}: left at SIGTERM.")
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model_wrapped, None)
            self._stop()
        results, of_datasets = [], defaultdict(list)
        for record, (text, probability) in zip(records, generated, strict=True):
            answers = record.get("answers") or [record["conversations"][-1]["assistant"]]
            answers = [normalise(answer) for answer in answers]
            results.append(Result(record["id"], answers, normalise(text), probability))
            if "dataset" in record:
                of_datasets[record["dataset"]].append(results[-1])
        numbers = self.compute_metrics(results)
        by_dataset = dataset_metrics(self.compute_metrics, of_datasets)
        print_first(f"{file_name}: {_shown(numbers)} on {len(results)} samples")
        metrics = {f"{metric_key_prefix}_{name}": number for name, number in numbers.items()}
        for dataset, its in by_dataset.items():
            print_first(f"  {dataset}: {_shown(its)} on {len(of_datasets[dataset])} samples")
            metrics |= {f"{metric_key_prefix}_{dataset}_{name}": its[name] for name in its}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.is_world_process_zero():
            several = any(len(result.answers) > 1 for result in results)
            written = {
                **numbers,
                **({"datasets": by_dataset} if by_dataset else {}),
                "ids": [result.id for result in results],
                "answers_unique": [r.answers if several else r.answers[0] for r in results],
                "generated_texts_unique": [result.text for result in results],
            }
            if self.choices:
                written["probabilities"] = [result.probability for result in results]
            with phase(f"--output_dir {self.args.output_dir}: writing {file_name}"):
                self.folder.write_json(file_name, written)
                self._save_state(records, results)
        if file_name == LAST_RESULT:
            print_first(
                f"Results: {self.args.output_dir}. Ask it: python -m phi3v.answer "
                f'{self.args.output_dir} --image <file> "<question>"'
            )
            self._end_trackers()
            if self.args.push_to_hub and not self.flags.merge_lora:
                self.push_to_hub()
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """The Trainer's, for which the checkpoint of this step is written after its evaluation."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.saved_step == self.state.global_step:
            self.state.best_model_checkpoint = str(
                self.folder.path / f"checkpoint-{self.state.global_step}"
            )
        return is_best

    def _generate(self, records: Sequence, desc: str) -> list[tuple[str, float | None]] | None:
        step, theirs, generated = self.last_generated
        if step == self.state.global_step and theirs is records and self.saved:
            return generated  # the Trainer evaluates after the last step as well
        with self._whole_model() as model, self.accelerator.autocast():
            generated = generate(
                *(model, self.processor, records, self.args, self.flags.max_new_tokens),
                choices=self.choices,
                desc=desc,
                stop=stopping.received,
            )
        if not self.args.load_best_model_at_end:
            self.last_generated = (self.state.global_step, records, generated)
        return generated

    @contextlib.contextmanager
    def _whole_model(self) -> Iterator[torch.nn.Module]:
        """
        The model on this rank's device. Under ZeRO-3, its shards are put together for as long: once
        and not for every token, and ranks need not generate in step.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not is_deepspeed_zero3_enabled():
            if getattr(model, "hf_device_map", None) is None:
                model.to(self.args.device)
            yield model
            return
        import deepspeed
        from deepspeed.runtime.zero import unwrap_model_for_generation

        if self.model_wrapped is self.model:  # training has not started its engine yet
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                yield model
        else:
            with unwrap_model_for_generation(self.model_wrapped):
                yield model

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the trained model (of LoRA: the adapter), the processor and trainer_state.json to the
        output folder, with a model card. Files get their names when they are whole.
        """
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        first = self.is_world_process_zero()
        with phase(f"--output_dir {self.args.output_dir}: saving the model"):
            with self.folder.finished_files() if first else contextlib.nullcontext() as folder:
                # Ranks have to save together: each may have a part of the weights.
                super().save_model(str(folder), _internal_call=True)  # pushed at the end
            self.saved = True
            if first:
                self._save_state()
        what = "adapter" if isinstance(self.model, PeftModel) else "model"
        print_first(f"Saved the {what} to {self.args.output_dir}")
        self.accelerator.wait_for_everyone()

    def _save_state(self, records: Sequence[dict] = (), results: Sequence[Result] = ()) -> None:
        """
        Write trainer_state.json, the report, where there are results of an evaluation, and beside
        the trained model its card. An evaluation alone leaves what is there of a training.
        """
        if self.flags.eval_only and self.folder.finished:
            return
        if not self.flags.eval_only:
            with self.folder.finished_files() as folder:
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if results:
            self._write_report(records, results)
        if self.saved:
            name = (self.hub_model_id or str(self.folder.path.absolute())).split("/")[-1]
            card = model_card(self.folder.path, self.flags, self.model, self.state, name)
            with self.folder.finished_files() as folder:
                card.save(folder / "README.md")

    def _write_report(self, records: Sequence[dict], results: Sequence[Result]) -> None:
        """A run is worth more than its report: whatever fails here is said in one line."""
        try:
            from ..report import Answer, write_report  # here: it brings matplotlib with it

            about, command = describe(self.flags, self.model, self.state)
            answers = [Answer(*result[1:]) for result in results]
            choices = [normalise(choice) for choice in self.choices or ()]
            write_report(self.folder, about, command, records, answers, choices)
        except Exception as error:
            print(f"No report of this evaluation: {one_line(error)}", flush=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        options = {}
        if isinstance(self.model, PeftModel):
            # lm_head has an adapter, which makes PEFT save the whole of it as well (0.21,
            # save_embedding_layers="auto"). It can go when the Trainer hands this on.
            options["save_embedding_layers"] = False
        else:
            # The Trainer turns the cache off for training; a saved model generates.
            self.model.config.use_cache = True
        self.model.save_pretrained(output_dir, state_dict=state_dict, **options)
        self.processor.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """The Trainer's checkpoint, which counts once all ranks have written their parts."""
        name = f"checkpoint-{self.state.global_step}"
        with phase(f"--output_dir {self.args.output_dir}: saving {name}"):
            if self.is_world_process_zero():
                self.folder.begin_checkpoint(name)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.folder.complete_checkpoint(name, self.state.global_step, self.settings)
                best = self.state.best_model_checkpoint
                self.folder.remove_older_checkpoints(
                    name, self.flags.save_total_limit, keep=Path(best).name if best else None
                )
            # Or a rank that ends here would have torchrun and Slurm end the first one too early.
            self.accelerator.wait_for_everyone()
        self.saved_step = self.state.global_step

    def _load_best_model(self) -> None:
        wait_until_seen(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def merge_adapter(self) -> None:
        """Also write the model with the adapter merged into it, see `merging.py`."""
        merge_adapter(self.flags)
        if self.args.push_to_hub:
            self.push_to_hub()

    def init_hf_repo(self, *args, **kwargs) -> None:
        """`trainer_arguments` has made it."""
        self.hub_model_id = self.args.hub_model_id

    def push_to_hub(self, *args, **kwargs) -> None:
        """Upload the output folder, see `push`."""
        push(self.folder, self.args)


def evenly(records: Sequence, count: int | None) -> Sequence:
    """
    `count` of the records, evenly spaced; all of them without one, or where there are fewer. Of a
    mixture, each dataset has its share, and one at least, with which there may be a few more.
    """
    if count is None or count >= len(records):
        return records
    chosen = []
    for part in records.spans() if isinstance(records, Mixture) else [range(len(records))]:
        share = max(1, round(count * len(part) / len(records)))
        chosen += [part[len(part) * i // share] for i in range(share)]
    return Subset(records, chosen)


def _shown(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {number:.4f}" for name, number in numbers.items())


class _Steps(TrainerCallback):
    """Tells the trainer what it has no method for: that training begins, and that a step ends."""

    def __init__(self, trainer: Phi3VTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.log_history:
            state.log_history += self.trainer.earlier_logs
        # The run may have been stopped between a checkpoint and the evaluation of its step.
        step, every = state.global_step, args.eval_steps
        due = step and args.eval_strategy == "steps" and step % every == 0
        if due and not any(
            "eval_runtime" in entry and entry["step"] == step for entry in state.log_history
        ):
            self.trainer._determine_best_metric(self.trainer.evaluate(), trial=None)

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.after_step()

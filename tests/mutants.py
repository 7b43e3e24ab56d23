"""
Plants faults in the code, one at a time, and looks whether the tests notice:

    python -m tests.mutants            all of them, two at a time
    python -m tests.mutants packing    those whose name or file has "packing" in it

Every fault is planted in a copy of the repository, where the tests that should notice it run. All
of them are tests that `make test` runs, and a copy without a fault has to pass them. Prints
caught / planted; the exit status is 0 if all are caught.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "tests"))

from helpers.launcher import Launcher  # noqa: E402

PASSED, TESTS_FAILED = 0, 1  # pytest's exit statuses
CONTROL = "nothing is planted"


class Mutant(NamedTuple):
    name: str
    file: str
    right: str  # stands once in the file
    wrong: str
    tests: str  # files of tests/, without .py


VIDEO, FRAME_FOLDER = "phi3v/data/video.py", "phi3v/data/frame_folder.py"
ENGINE = "phi3v/data/engine.py"
SAMPLING, SEEKING = "phi3v/data/sampling.py", "phi3v/data/seeking.py"
MODEL, IMAGES = "phi3v/model/modeling_phi3_v.py", "phi3v/model/image_processing_phi3_v.py"
CHECKPOINTS, OUTPUT = "phi3v/training/checkpoints.py", "phi3v/training/output_folder.py"

MUTANTS = [
    # ---- No fault
    Mutant(CONTROL, MODEL, "class Phi3VVisionTower(", "class Phi3VVisionTower(", ""),
    # ---- The model: what the official code computes
    Mutant(
        "rope: the long factors' form is not read",
        "phi3v/model/configuration_phi3_v.py",
        '        rope["rope_type"] = "longrope"',
        '        rope["rope_type"] = "default"',
        "test_modeling",
    ),
    Mutant(
        "rope: another scaling factor of cos and sin",
        "phi3v/model/configuration_phi3_v.py",
        'self.rope_parameters.setdefault("factor", extension)',
        'self.rope_parameters["factor"] = 1.0',
        "test_modeling",
    ),
    Mutant(
        "CLIP: the last layer instead of the one before",
        MODEL,
        "for layer in self.vision_model.encoder.layers[:-1]:",
        "for layer in self.vision_model.encoder.layers:",
        "test_modeling",
    ),
    Mutant(
        "CLIP: post_layernorm is applied",
        MODEL,
        "        return hidden_states[:, 1:]",
        "        return self.vision_model.post_layernorm(hidden_states)[:, 1:]",
        "test_modeling",
    ),
    Mutant(
        "projection: GELU by tanh",
        MODEL,
        "            nn.GELU(),",
        '            nn.GELU("tanh"),',
        "test_modeling",
    ),
    Mutant(
        "separators: the two are swapped",
        MODEL,
        "torch.stack([self.glb_GN.flatten(), self.sub_GN.flatten()])",
        "torch.stack([self.sub_GN.flatten(), self.glb_GN.flatten()])",
        "test_modeling",
    ),
    Mutant(
        "layout: the global crop first",
        MODEL,
        "torch.cat([end_lines(local), crops.new_tensor([GLB_GN]), end_lines(crops[0])])",
        "torch.cat([end_lines(crops[0]), crops.new_tensor([GLB_GN]), end_lines(local)])",
        "test_modeling",
    ),
    Mutant(
        "layout: 2 x 2 patches are merged in the other order",
        MODEL,
        "            .transpose(2, 3)\n",
        "            .permute(0, 1, 3, 4, 2, 5)\n",
        "test_modeling",
    ),
    Mutant(
        "layout: crops one after the other, not line by line",
        MODEL,
        "        .transpose(1, 2)\n        .reshape(rows * side, columns * side)",
        "        .reshape(rows * side, columns * side)",
        "test_modeling",
    ),
    Mutant(
        "generation: at the switch to the long factors, padding counts as text",
        MODEL,
        '["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)',
        '["position_ids"] = torch.ones_like(attention_mask).cumsum(-1) - 1',
        "test_modeling",
    ),
    Mutant(
        "saving: the base's tokenizer in place of a changed one",
        "phi3v/model/processing_phi3_v.py",
        "        same = _state(theirs) == _state(self.tokenizer)",
        "        same = True",
        "test_processing",
    ),
    Mutant(
        "generation: no switch to the long factors",
        MODEL,
        "return length - new_tokens <= limit < length",
        "return False",
        "test_modeling",
    ),
    Mutant(
        "generation: answers end at </s> alone",
        MODEL,
        "STOP_TOKEN_IDS = [32000, 32001, 32007]",
        "STOP_TOKEN_IDS = [2]",
        "test_modeling",
    ),
    Mutant(
        "loss: averaged over this call, whatever the whole step has",
        MODEL,
        "logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs",
        "logits=logits, labels=labels, vocab_size=self.config.vocab_size",
        "test_modeling",
    ),
    Mutant(
        "image of no size: it takes a token",
        MODEL,
        "        if rows == 0:\n            return 0",
        "        if rows == 0:\n            return 1",
        "test_modeling",
    ),
    Mutant(
        "config: the tower keeps its own attention",
        "phi3v/model/configuration_phi3_v.py",
        'sub_configs = {"vision_config": CLIPVisionConfig}',
        "sub_configs = {}",
        "test_modeling",
    ),
    Mutant(
        "frozen tower: the unused tail trains",
        MODEL,
        "self.vision_model.post_layernorm.requires_grad_(False)",
        "self.vision_model.post_layernorm.requires_grad_(True)",
        "test_training",
    ),
    # ---- Pixels
    Mutant(
        "pixels: the global view is bilinear",
        IMAGES,
        'mode="bicubic"',
        'mode="bilinear"',
        "test_processing",
    ),
    Mutant(
        "pixels: padding is black",
        IMAGES,
        'Image.new("RGB", padded, "white")',
        'Image.new("RGB", padded, "black")',
        "test_processing",
    ),
    Mutant(
        "pixels: padding at the bottom alone",
        IMAGES,
        "(padded[1] - resized[1]) // 2))",
        "0))",
        "test_processing",
    ),
    Mutant(
        "pixels: one row lower",
        IMAGES,
        "int(crops * size / ratio)",
        "int(crops * size / ratio) - 1",
        "test_processing",
    ),
    Mutant(
        "pixels: scaled by PIL's other filter",
        IMAGES,
        "image = image.resize(resized, Image.Resampling.BILINEAR)",
        "image = image.resize(resized, Image.Resampling.BICUBIC)",
        "test_processing",
    ),
    Mutant(
        "pixels: a portrait image is not laid on its side",
        IMAGES,
        "if image.width < image.height:",
        "if False:",
        "test_processing",
    ),
    # ---- Prompts and collators
    Mutant(
        "ids: no BOS after an image",
        "phi3v/model/processing_phi3_v.py",
        "                tokens += next(ids)\n",
        "                tokens += next(ids)[1:]\n",
        "test_processing",
    ),
    Mutant(
        "images: tags out of order get the wrong image",
        "phi3v/model/processing_phi3_v.py",
        "in_order += [own[number - 1] for number in numbers]",
        "in_order += [own[number - 1] for number in sorted(numbers)]",
        "test_processing",
    ),
    Mutant(
        "collator: the prompt is trained too",
        "phi3v/data/collators.py",
        "            labels.append(token if answering else IGNORED)",
        "            labels.append(token)",
        "test_collators",
    ),
    Mutant(
        "collator: earlier answers are not trained",
        "phi3v/data/collators.py",
        "            answering = answering or token == self.assistant\n",
        "            answering = False\n",
        "test_collators",
    ),
    Mutant(
        "collator: the answer's <|endoftext|> is missing",
        "phi3v/data/collators.py",
        "<|end|>\\n<|endoftext|>",
        "<|end|>",
        "test_collators test_packing",
    ),
    Mutant(
        "collator: prompts to generate from are padded on the right",
        "phi3v/data/collators.py",
        'self.processor.tokenizer.pad_token_id, "left"),',
        'self.processor.tokenizer.pad_token_id, "right"),',
        "test_collators",
    ),
    Mutant(
        "packing: samples see each other",
        "phi3v/data/collators.py",
        "_join([range(len(row)) for row in ids])",
        "_join([range(sum(map(len, ids)))])",
        "test_packing",
    ),
    Mutant(
        "collator: labels are shifted by two",
        "phi3v/data/collators.py",
        '(batch["labels"][:, 1:] != IGNORED)',
        '(batch["labels"][:, 2:] != IGNORED)',
        "test_collators",
    ),
    Mutant(
        "packing: rows are too long by one",
        "phi3v/data/packing.py",
        "at = bisect_left(rooms, length)",
        "at = bisect_left(rooms, length - 1)",
        "test_packing",
    ),
    Mutant(
        "packing: --max_length leaves out samples that fit",
        "phi3v/data/packing.py",
        "if max_length is None or length <= max_length]",
        "if max_length is None or length < max_length]",
        "test_packing",
    ),
    Mutant(
        "mixing: an epoch ends with its first dataset, not with its last",
        "phi3v/data/mixing.py",
        "length = max(size / weight",
        "length = min(size / weight",
        "test_mixing",
    ),
    Mutant(
        "mixing: another weight is not noticed on resuming",
        CHECKPOINTS,
        '{n}: {count} of {fingerprint(part)}"',
        '{n}: {fingerprint(part)}"',
        "test_mixing",
    ),
    Mutant(
        "mixing: the loss of a dataset is that of the first rank",
        "phi3v/training/by_dataset.py",
        "dist.all_reduce(totals)",
        "pass",
        "test_mixing",
    ),
    # ---- Training
    Mutant(
        "arguments: AdamW's second beta",
        "finetune_hf_trainer_docvqa.py",
        "adam_beta2=0.95,",
        "adam_beta2=0.999,",
        "test_recipes",
    ),
    Mutant(
        "arguments: accumulation forgets the ranks",
        "phi3v/training/launch.py",
        "// (world_size() * args.batch_size_per_gpu),",
        "// args.batch_size_per_gpu,",
        "test_strategies",
    ),
    Mutant(
        "arguments: a learning rate of 0 becomes the base rate",
        "phi3v/training/trainer.py",
        'for rate in {rates[parameter] for parameter in group["params"]} - {None}:',
        'for rate in {rates[parameter] for parameter in group["params"]} - {None, 0}:',
        "test_training",
    ),
    Mutant(
        "arguments: NaN is a number",
        "phi3v/training/arguments.py",
        "if outside or not math.isfinite(value):",
        "if outside:",
        "test_training",
    ),
    Mutant(
        "LoRA: a frozen vision model has adapters",
        "phi3v/training/loading.py",
        "{'' if frozen else idle}",
        "{idle}",
        "test_loading",
    ),
    Mutant(
        "frozen: the token embedding is frozen as well",
        "phi3v/training/loading.py",
        "model.model.vision_embed_tokens.requires_grad_(False)",
        "model.model.vision_embed_tokens.requires_grad_(False)\n"
        "        model.model.embed_tokens.requires_grad_(False)",
        "test_training",
    ),
    Mutant(
        "loss scaling: the first overflow ends the run",
        "phi3v/training/trainer.py",
        "if any_bad and not (self.args.fp16 and self.overflows < MOST_OVERFLOWS):",
        "if any_bad:",
        "test_checkpoints",
    ),
    Mutant(
        "loss scaling: overflows far apart end the run",
        "phi3v/training/trainer.py",
        "self.overflows = self.overflows + 1 if any_bad else 0",
        "self.overflows = self.overflows + any_bad",
        "test_checkpoints",
    ),
    # ---- Evaluation
    Mutant(
        "evaluation: answers go to the wrong samples",
        "phi3v/training/generation.py",
        "list(zip(mine, found, strict=True))",
        "list(zip(sorted(mine), found, strict=True))",
        "test_training",
    ),
    Mutant(
        "evaluation: one answer of several accepted ones",
        "phi3v/training/trainer.py",
        'record.get("answers") or [',
        "[",
        "test_recipes",
    ),
    Mutant(
        "evaluation: a row begins later than its prompt",
        "phi3v/training/attention.py",
        "lengths = attention_mask.sum(-1).tolist()",
        "lengths = (attention_mask.sum(-1) - 1).tolist()",
        "test_training",
    ),
    Mutant(
        "evaluation: left at SIGTERM, and written all the same",
        "phi3v/training/generation.py",
        "                    if stop():\n                        break\n",
        "                    stop()\n",
        "test_stopping",
    ),
    Mutant(
        "metric: full stops count",
        "phi3v/training/metrics.py",
        'string.whitespace + "."',
        "string.whitespace",
        "test_metrics",
    ),
    Mutant(
        "metric: ANLS without a threshold",
        "phi3v/training/metrics.py",
        "sum(score for score in best if score >= threshold)",
        "sum(best)",
        "test_metrics",
    ),
    Mutant(
        "metric: ANLS minds case",
        "phi3v/training/metrics.py",
        '" ".join(text.lower().split())',
        '" ".join(text.split())',
        "test_metrics",
    ),
    # ---- Checkpoints and the output folder
    Mutant(
        "checkpoints: half a checkpoint counts",
        OUTPUT,
        "    if files is None:\n        return f",
        "    if files is None:\n        return None and f",
        "test_checkpoints test_output_folder",
    ),
    Mutant(
        "checkpoints: the list of files is written first",
        "phi3v/training/trainer.py",
        "                self.folder.begin_checkpoint(name)",
        "                pass",
        "test_checkpoints",
    ),
    Mutant(
        "checkpoints: the oldest is kept, the newest goes",
        "phi3v/training/output_folder.py",
        "whole[: max(0, len(whole) + 1 - limit)]",
        "whole[::-1][: max(0, len(whole) + 1 - limit)]",
        "test_checkpoints test_stopping",
    ),
    Mutant(
        "resume: other settings are taken",
        "phi3v/training/checkpoints.py",
        "    if differences := _differences(theirs or {}, ours):\n",
        "    if (differences := _differences(theirs or {}, ours)) and False:\n",
        "test_checkpoints",
    ),
    Mutant(
        "resume: the oldest checkpoint",
        CHECKPOINTS,
        "checkpoint = whole[-1]",
        "checkpoint = whole[0]",
        "test_checkpoints",
    ),
    Mutant(
        "resume: a damaged checkpoint is thrown away",
        CHECKPOINTS,
        "    elif damaged:\n",
        "    elif False:\n",
        "test_output_folder",
    ),
    Mutant(
        "output: the model's folder is written to",
        "phi3v/training/arguments.py",
        "        yield problem\n",
        "        pass\n",
        "test_output_folder",
    ),
    Mutant(
        "output: an old run goes before the model is loaded",
        CHECKPOINTS,
        "            folder.lock()\n",
        "            folder.lock()\n"
        "            if args.overwrite_output_dir:\n                folder.remove_run()\n",
        "test_output_folder",
    ),
    Mutant(
        "output: a user's files go with the run's",
        OUTPUT,
        '        _remove_files(self.path, record["files"])\n',
        "        shutil.rmtree(self.path)\n",
        "test_output_folder",
    ),
    Mutant(
        "output: two runs at once",
        CHECKPOINTS,
        "            folder.lock()\n",
        "",
        "test_output_folder",
    ),
    Mutant(
        "output: files for their owner alone",
        OUTPUT,
        "                    path.chmod(MODE)\n",
        "",
        "test_output_folder",
    ),
    Mutant(
        "merge: a failure takes the adapter with it",
        "phi3v/training/merging.py",
        "    except Exception as error:  # the disk, the memory, the hub\n",
        "    except Exception as error:\n"
        '        (output.path / "adapter_model.safetensors").unlink()\n',
        "test_output_folder",
    ),
    # ---- Data
    Mutant(
        "data: control tokens in texts",
        "phi3v/data/records.py",
        "    if found := CONTROL_TOKEN.search(check_type(text, str, field)):",
        "    if found := None and check_type(text, str, field):",
        "test_bad_input",
    ),
    Mutant(
        "data: images from outside the folder",
        "phi3v/data/rows.py",
        "            if not inside:\n",
        "            if False:\n",
        "test_bad_input",
    ),
    Mutant(
        "data: ids twice",
        "phi3v/data/records.py",
        "                elif identifier in first:",
        "                elif False:",
        "test_bad_input",
    ),
    Mutant(
        "data: rows are counted from the part that is loaded",
        "phi3v/data/sources.py",
        "return rows.add_column(ROW, np.arange(len(rows))).select(part)",
        "return rows.select(part).add_column(ROW, np.arange(len(part)))",
        "test_bad_input",
    ),
    Mutant(
        "data: a machine looks at a part of its files only",
        "phi3v/distributed.py",
        'gather(platform.node() if each_machine else "")',
        'gather("")',
        "test_bad_input",
    ),
    Mutant(
        "data: any image format is opened",
        "phi3v/data/images.py",
        'if opened.format not in (*FORMATS, "MPO", None):',
        "if False:",
        "test_bad_input",
    ),
    # ---- Several machines
    Mutant(
        "machines: ranks that are restarted look for a store that is kept",
        "phi3v/training/launch.py",
        'os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"',
        "False",
        "test_nodes",
    ),
    Mutant(
        "machines: a rank loads the best checkpoint before it sees it",
        "phi3v/training/trainer.py",
        "wait_until_seen(Path(self.state.best_model_checkpoint))",
        "pass",
        "test_ranks",
    ),
    Mutant(
        "machines: DeepSpeed's checkpoints are for any number of processes",
        CHECKPOINTS,
        'if settings["deepspeed"] is not None:',
        "if False:",
        "test_checkpoints",
    ),
    # ---- The converter
    Mutant(
        "converter: frames are taken from the middle",
        SAMPLING,
        "shown[i * len(shown) // number]",
        "shown[(2 * i + 1) * len(shown) // (2 * number)]",
        "test_convert_ucf101",
    ),
    Mutant(
        "converter: --fps takes the next frame",
        SAMPLING,
        "[i for i in range(len(times.ticks)) if due[i] < due[i + 1]]",
        "[i for i in range(1, len(times.ticks)) if due[i - 1] < due[i]]",
        "test_convert_ucf101",
    ),
    Mutant(
        "converter: images of other --fps are kept",
        FRAME_FOLDER,
        '        line["frames"] = str(sampling)\n',
        "",
        "test_convert_ucf101",
    ),
    Mutant(
        "seeking: frames are not compared by their time stamps",
        SEEKING,
        "frame.pts != index.stamps[number]",
        "False",
        "test_video_seeking",
    ),
    Mutant(
        "seeking: leading frames are taken from the key frame after them",
        SEEKING,
        "bisect_right(self.starts, number)",
        "bisect_right(self.packets, number)",
        "test_video_seeking",
    ),
    Mutant(
        "seeking: a frame that does not reset the decoder is a start",
        SEEKING,
        "start = kind in self.kinds.starts",
        "start = packet.is_keyframe",
        "test_video_seeking",
    ),
    Mutant(
        "seeking: damage is concealed",
        SEEKING,
        ', "err_detect": "explode"',
        "",
        "test_video_seeking",
    ),
    Mutant(
        "seeking: the decoder keeps the frames of before",
        SEEKING,
        "                codec.flush_buffers()\n",
        "                pass\n",
        "test_video_seeking",
    ),
    Mutant(
        "converter: ids start at one",
        "convert_ucf101.py",
        "{len(videos):010d}",
        "{len(videos) + 1:010d}",
        "test_convert_ucf101",
    ),
    Mutant(
        "converter: ffmpeg opens any format",
        VIDEO,
        '"format_whitelist": CONTAINERS, ',
        "",
        "test_convert_ucf101",
    ),
    Mutant(
        "converter: a changed image is kept",
        FRAME_FOLDER,
        ' and found == old["files"]',
        "",
        "test_convert_ucf101",
    ),
    Mutant(
        "converter: a worker outlives its killed parent",
        ENGINE,
        "multiprocessing.parent_process().join()",
        "threading.Event().wait()",
        "test_convert_ucf101",
    ),
    Mutant(
        "converter: an archive's header that is damaged ends it",
        VIDEO,
        "!= bytes(tarfile.BLOCKSIZE)",
        "is None",
        "test_convert_ucf101",
    ),
    Mutant(
        "converter: --finish does not look whether all videos are done",
        FRAME_FOLDER,
        "            if not is_done(line, sampling)\n",
        "            if False\n",
        "test_convert_on_many",
    ),
    Mutant(
        "converter: a shard lets one machine in",
        FRAME_FOLDER,
        "locked(self.folder / LOCK, shared=self.shard is not None)",
        "locked(self.folder / LOCK, shared=True)",
        "test_convert_on_many",
    ),
    Mutant(
        "shards: damage is not noticed",
        "phi3v/data/shard_rows.py",
        '"page_checksum_verification": True',
        '"page_checksum_verification": False',
        "test_shards",
    ),
    Mutant(
        "shards: records are read in the order of the files",
        "phi3v/shards.py",
        'order = np.lexsort((table["number"].to_numpy(), table["row"].to_numpy()))',
        "order = np.arange(len(table))",
        "test_shards",
    ),
    Mutant(
        "shards: every epoch has the same order",
        "phi3v/data/shard_order.py",
        "np.random.default_rng([self.seed, self.epoch])",
        "np.random.default_rng([self.seed, 0])",
        "test_shards",
    ),
    Mutant(
        "engine: results come as they are done",
        ENGINE,
        "        for done, result in results:\n            early[done] = result\n",
        "        for done, (_, result) in enumerate(results):\n            early[done] = result\n",
        "test_convert_on_many",
    ),
    Mutant(
        "engine: on Ray, an item goes with its node",
        ENGINE,
        "elif isinstance(error, process_died + node_died):",
        "elif isinstance(error, process_died):",
        "test_convert_on_many",
    ),
    # ---- Other people's tools
    Mutant(
        "processor: completions begin with <s>",
        "phi3v/model/processing_phi3_v.py",
        "                add_special_tokens=add_special_tokens,\n",
        "",
        "test_ecosystem",
    ),
    Mutant(
        "processor: the padding side is not handed on",
        "phi3v/model/processing_phi3_v.py",
        '            "padding_side": padding_side,\n',
        "",
        "test_ecosystem",
    ),
    Mutant(
        "hub: checkpoints are pushed too",
        "phi3v/training/card.py",
        'allow_patterns=folder.record["files"]',
        "allow_patterns=None",
        "test_card",
    ),
    Mutant(
        "hub: the token is looked for at the end",
        "phi3v/training/launch.py",
        "        create_repository(training_args)\n",
        "        pass\n",
        "test_card",
    ),
    Mutant(
        "hub: the weights are of the newest revision",
        "phi3v/training/loading.py",
        "        revision=args.model_revision,\n",
        "",
        "test_card",
    ),
    Mutant(
        "hub: the merge takes the newest revision",
        "phi3v/training/merging.py",
        "revision=args.model_revision",
        "revision=None",
        "test_card",
    ),
    Mutant(
        "trackers: closed with the training",
        "phi3v/training/trainer.py",
        "                tracker.on_train_end = lambda *args, **kwargs: None\n",
        "",
        "test_trackers",
    ),
    Mutant(
        "adapters: --use_rslora is for nothing",
        "finetune_hf_trainer_ucf101.py",
        "use_rslora=args.use_rslora",
        "use_rslora=False",
        "test_training",
    ),
    # ---- The plan
    Mutant(
        "plan: gradients of earlier micro-batches are not there",
        "phi3v/training/memory.py",
        "if self.setup.accumulation > 1 and not partitioned:",
        "if False:",
        "test_plan",
    ),
    Mutant(
        "plan: activations that are freed still count",
        "phi3v/training/memory.py",
        "        self.live[self.parts.pop(key)] -= size",
        "        self.parts.pop(key)",
        "test_plan",
    ),
    Mutant(
        "plan: the evaluation's batch is what the flag says",
        "phi3v/training/plan.py",
        "        rows //= 2\n",
        "        break\n",
        "test_plan",
    ),
    # ---- GPUs, as far as fake ones show
    Mutant(
        "gpu: the model asks the device where images stand",
        MODEL,
        "        if image_positions is None:\n",
        "        if True:\n",
        "test_fake_gpu",
    ),
    Mutant(
        "gpu: RoPE's float32 keys are cached",
        "phi3v/training/generation.py",
        "key_states.to(value_states.dtype)",
        "key_states",
        "test_fake_gpu",
    ),
    Mutant(
        "gpu: a copy that the host waits for",
        MODEL,
        ".to(projected.device, non_blocking=True)",
        ".to(projected.device)",
        "test_fake_gpu",
    ),
    Mutant(
        "attention: the samples of a packed row are one",
        "phi3v/data/collators.py",
        "[0, *accumulate(map(len, ids))]",
        "[0, sum(map(len, ids))]",
        "test_packing",
    ),
    Mutant(
        "attention: padding is attended to where one row has none",
        "phi3v/training/attention.py",
        "if min(lengths) == q_length:",
        "if max(lengths) == q_length:",
        "test_attention",
    ),
    Mutant(
        "attention: sdpa has no mask for a packed row",
        "phi3v/training/attention.py",
        'if "cu_seq_lens_q" in batch and not args.use_flash_attention:',
        "if False:",
        "test_packing",
    ),
    # ---- What people look at, and ask
    Mutant(
        "report: a user's text is read as HTML",
        "phi3v/report.py",
        "return escape(text if len(text)",
        "return (text if len(text)",
        "test_report",
    ),
    Mutant(
        "report: mistakes come last",
        "phi3v/report.py",
        "sorted(known, key=right)[:SAMPLES]",
        "sorted(known, key=right, reverse=True)[:SAMPLES]",
        "test_report",
    ),
    Mutant(
        "answer: a half-written line stays",
        "phi3v/answer_file.py",
        "os.truncate(part, sum(map(len, whole[:2])))",
        "os.truncate(part, sum(map(len, whole)))",
        "test_answer",
    ),
    Mutant(
        "answer: another model's answers are taken over",
        "phi3v/answer_file.py",
        'for key in ("id", "question", "model"):',
        'for key in ("id", "question"):',
        "test_answer",
    ),
    Mutant(
        "evaluation: early stopping begins to count anew on resume",
        "phi3v/training/launch.py",
        '"restore_callback_states_from_checkpoint": args.early_stopping_patience is not None,',
        '"restore_callback_states_from_checkpoint": False,',
        "test_evaluation_in_training",
    ),
    Mutant(
        "evaluation: the best checkpoint is the one before",
        "phi3v/training/trainer.py",
        "if is_best and self.saved_step == self.state.global_step:",
        "if False:",
        "test_evaluation_in_training",
    ),
]


def plant(mutant: Mutant, copy: Path) -> None:
    """A copy of the repository with one fault."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        **{"cwd": REPO, "capture_output": True, "text": True, "check": True},
    ).stdout.splitlines()
    for name in filter(lambda name: (REPO / name).is_file(), files):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, copy / name)
    path = copy / mutant.file
    text = path.read_text("utf-8")
    if text.count(mutant.right) != 1:
        raise SystemExit(f"{mutant.name}: not once in {mutant.file}: {mutant.right!r}")
    path.write_text(text.replace(mutant.right, mutant.wrong), "utf-8")


def notice(launcher: Launcher, mutant: Mutant) -> tuple[bool, str]:
    """Whether tests fail for a fault, and pass without one; and pytest's last line."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        plant(mutant, copy)
        named = mutant.tests or " ".join(other.tests for other in MUTANTS)
        tests = sorted({f"tests/{name}.py" for name in named.split()})
        flags = ("-q", "-x", "-m", "not long", "-p", "no:cacheprovider", "-p", "no:xdist")
        run = launcher.start("-m", "pytest", *flags, *tests, cwd=copy)
        lines = run.finish(900).strip().splitlines()
        expected = PASSED if mutant.name == CONTROL else TESTS_FAILED
        return run.returncode == expected, lines[-1] if lines else ""


def main(argv: list[str] | None = None) -> int:
    """Plant, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="of the faults' names or files")
    words = parser.parse_args(argv).words
    mutants = [m for m in MUTANTS if not words or any(w in f"{m.name} {m.file}" for w in words)]
    start, caught = time.monotonic(), 0
    launchers = [Launcher(), Launcher()]  # one for each of two threads: it serves one at a time
    with ThreadPoolExecutor(len(launchers)) as pool:

        def run(share: int) -> int:
            count = 0
            for mutant in mutants[share :: len(launchers)]:
                noticed, line = notice(launchers[share], mutant)
                print(f"{'good' if noticed else 'MISSED'}: {mutant.name}: {line}", flush=True)
                count += noticed
            return count

        caught = sum(pool.map(run, range(len(launchers))))
    for launcher in launchers:
        launcher.close()
    controls = sum(mutant.name == CONTROL for mutant in mutants)
    seconds = f"{time.monotonic() - start:.0f} s"
    print(f"caught {caught - controls} / planted {len(mutants) - controls} in {seconds}")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Make a tiny checkpoint in the format of Phi-3.5-vision, with random weights.

    python -m demo.make_checkpoint --out demo_output/tiny_phi3v

It has every part of the real one (config, weights, generation settings, processor, tokenizer with
the chat template) and about 0.6 million parameters, so it trains on a CPU in minutes. The tokenizer
is made here too: it treats special tokens, spaces and unknown characters as the real one does, and
knows the words of the demos' questions and answers as whole words.
"""

import argparse
import json
import string
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GenerationConfig, PreTrainedTokenizerFast

from demo.make_datasets import NUMBER_WORDS
from demo.make_videos import CLASSES, FRAME_SIZE
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor

# What becomes whole words in the vocabulary. Every other text falls into characters and bytes.
WORDS = (
    *CLASSES,
    "Classify the video into one of the following classes",
    *NUMBER_WORDS,
    "Which digit is at the top bottom Answer briefly",
    "A flower goes with zero and a temple goes with one Is this meme right Yes No",
    "Both pictures show a flower Exactly one picture shows The left right",
    "Is this true or false True False",
)

# Special token -> whether it eats the white space that follows it. All as in the real tokenizer.
SPECIAL_TOKENS = {
    "<|endoftext|>": False,
    "<|assistant|>": True,
    "<|placeholder1|>": True,
    "<|placeholder2|>": True,
    "<|placeholder3|>": True,
    "<|placeholder4|>": True,
    "<|system|>": False,
    "<|end|>": False,
    "<|user|>": False,
    "<|image|>": True,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}"
    "{{- '<|assistant|>\n' -}}"
    "{% endif %}"
)


def llama_normalizer() -> normalizers.Normalizer:
    """Spaces become a visible sign, and every piece of text starts with one."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def learn_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """Train BPE on WORDS until each is one token; return its pieces and merges."""
    draft = Tokenizer(models.BPE())
    draft.normalizer = llama_normalizer()
    # For training only: no piece may reach across two words.
    draft.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    alphabet = [*string.ascii_letters, *string.digits, *string.punctuation, "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    draft.train_from_iterator(WORDS, trainer)
    learned = json.loads(draft.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    return pieces, [tuple(pair) for pair in learned["merges"]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Ids: <unk> <s> </s>, 256 bytes, the learned pieces, the special tokens."""
    pieces, merges = learn_merges()
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *byte_pieces, *pieces])}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = llama_normalizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s>:1 $B:1",
        special_tokens=[("<s>", vocab["<s>"])],
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer.add_special_tokens(
        [
            AddedToken(token, rstrip=eats_space, normalized=False)
            for token, eats_space in SPECIAL_TOKENS.items()
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Phi3VConfig:
    """The official config.json, scaled down to 2 decoder layers on a tower that computes 2."""
    heads, head_dim = 4, 32
    hidden_size = heads * head_dim
    return Phi3VConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        initializer_range=0.05,  # at the usual 0.02, so narrow a model learns slowly at first
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        # One factor per pair of rotated channels. Random weights need no particular ones.
        rope_scaling={
            "type": "su",
            "short_factor": [1.0] * (head_dim // 2),
            "long_factor": [32.0] * (head_dim // 2),
        },
        img_processor={
            "image_dim_out": 64,
            "num_img_tokens": 4,  # a crop of 4x4 patches, merged 2x2
            "clip_config": {
                "image_size": FRAME_SIZE,
                "patch_size": 14,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,  # the last one is never used, as in the real model
                "num_attention_heads": 4,
            },
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_checkpoint(out: Path, seed: int) -> int:
    """Write the folder and return the number of parameters."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = Phi3VForCausalLM(build_config(tokenizer))
    crop_size = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    image_processor = Phi3VImageProcessor(num_crops=1, crop_size=crop_size)
    save_checkpoint(out, model, Phi3VProcessor(image_processor, tokenizer))
    return model.num_parameters()


def save_checkpoint(out: Path, model: Phi3VForCausalLM, processor: Phi3VProcessor) -> None:
    """Write the model, the processor, and generation settings with the tokenizer's ids."""
    tokenizer = processor.tokenizer
    stops = ("<|endoftext|>", "<|assistant|>", "<|end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output/tiny_phi3v"))
    parser.add_argument("--seed", type=int, default=0, help="draws the random weights")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    parameters = write_checkpoint(args.out, args.seed)
    print(f"{args.out}: {parameters:,} parameters")


if __name__ == "__main__":
    main()

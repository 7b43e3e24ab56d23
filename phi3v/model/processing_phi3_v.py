"""Phi-3.5-vision processor: prompts with image tags, and their images, to the model's inputs."""

from .configuration_phi3_v import Phi3VConfig  # noqa: F401

# isort: split
import json
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import ImageInput, is_valid_image
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "tokenizer.model",
)
FROM_CACHE = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}
# What loading a processor leaves in its tokenizer's settings (transformers 5.17 to 5.24).
NOT_OF_A_TOKENIZER = ("is_local", "local_files_only", "num_crops")
IMAGE_TAG = re.compile(r"<\|image_(\d+)\|>")

# Ahead of a chat template: messages whose content is a list of parts get the string that the
# official template knows, with the images' tags.
PARTS_TO_TAGS = (
    "{%- set all = namespace(messages=[], images=0, text='') -%}"
    "{%- for message in messages -%}"
    "{%- set all.text = message['content'] if message['content'] is string else '' -%}"
    "{%- for part in message['content'] if message['content'] is not string -%}"
    "{%- if part['type'] == 'image' -%}"
    "{%- set all.images = all.images + 1 -%}"
    "{%- set all.text = all.text + '<|image_' + all.images | string + '|>\\n' -%}"
    "{%- else -%}{%- set all.text = all.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set all.messages = all.messages + [dict(message, content=all.text)] -%}"
    "{%- endfor -%}"
    "{%- set messages = all.messages -%}"
)


class ImageTags(Sequence):
    """
    `<|image_1|>`, `<|image_2|>`, ... as the sequence that the official processor holds in memory.
    """

    def __init__(self, count: int = 1_000_000):
        self._numbers = range(1, count + 1)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [f"<|image_{number}|>" for number in self._numbers[index]]
        return f"<|image_{self._numbers[index]}|>"


class Phi3VProcessor(ProcessorMixin):
    """
    Wraps the image processor and the tokenizer.

    A text refers to its images by `<|image_1|>`, `<|image_2|>`, ... Every tag becomes as many
    `<|image|>` ids as the image has tokens; the model puts the image's features there.
    """

    image_token = "<|image|>"
    stop_tokens = ("<|endoftext|>", "<|assistant|>", "<|end|>")
    img_tokens = ImageTags()

    def __init__(self, image_processor=None, tokenizer=None, chat_template: str | None = None):
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template
        )
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def num_img_tokens(self) -> int:
        """Tokens of one crop, without separators."""
        return self.image_processor.num_img_tokens

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids at which an answer ends."""
        return self.tokenizer.convert_tokens_to_ids(list(self.stop_tokens))

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def calc_num_image_tokens(self, images: ImageInput) -> list[int]:
        return self.image_processor.calc_num_image_tokens(images)

    def calc_num_image_tokens_from_image_size(self, width: int, height: int) -> int:
        return self.image_processor.calc_num_image_tokens_from_image_size(width, height)

    def __call__(
        self,
        text: str | list[str],
        images: ImageInput | list[list] | None = None,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        videos: None = None,
        audio: None = None,
        **images_kwargs,
    ) -> BatchFeature:
        """
        Args:
            text: one prompt or several.
            images: the images of one text; a list of lists, one for each text; or one flat list,
                which the texts share out in order. Without images, tags are text like any other.
            padding, padding_side, pad_to_multiple_of: as for a tokenizer; several texts need
                `padding`.
            truncation, max_length, add_special_tokens: as for a tokenizer, for texts without
                images. A text with images is never cut, and always has BOS, see `tokenize`.
            videos, audio: transformers' chats pass None.
            images_kwargs: passed on to the image processor, `num_crops` for example.

        Returns:
            `input_ids` and `attention_mask` (texts, tokens). With images, `pixel_values` (n,
            num_crops + 1, 3, 336, 336) and `image_sizes` (n, 2) of all texts' images, in the order
            of their tags in the texts.

        Raises:
            ValueError: the tags of a text do not match its images.
        """
        pad_options = {
            "padding": padding,
            "padding_side": padding_side,
            "pad_to_multiple_of": pad_to_multiple_of,
            "max_length": max_length,
            "return_tensors": return_tensors,
        }
        if images is None:
            encoded = self.tokenizer(
                text,
                truncation=truncation,
                add_special_tokens=add_special_tokens,
                **pad_options,
            )
            return BatchFeature(dict(encoded))

        texts = [text] if isinstance(text, str) else list(text)
        tags = [[int(number) for number in IMAGE_TAG.findall(text)] for text in texts]
        shared = share_images(images, tags)
        in_order = []
        for row, (numbers, own) in enumerate(zip(tags, shared, strict=True)):
            check_tags(row, numbers, len(own))
            # The model fills placeholders from left to right, so tags out of order reorder the
            # images.
            in_order += [own[number - 1] for number in numbers]

        image_inputs, lengths = {}, []
        if in_order:
            image_inputs = dict(
                self.image_processor(in_order, return_tensors=return_tensors, **images_kwargs)
            )
            lengths = [int(length) for length in image_inputs.pop("num_img_tokens")]
        input_ids = self.tokenize(texts, lengths)
        encoded = self.tokenizer.pad(
            {"input_ids": input_ids, "attention_mask": [[1] * len(ids) for ids in input_ids]},
            **pad_options,
        )
        return BatchFeature({**encoded, **image_inputs})

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        As the parent. A message's content is a string with tags, as in the official code, or a list
        of parts, `{"type": "image"}` and `{"type": "text", "text": ...}`.
        """
        template = PARTS_TO_TAGS + (chat_template or self.chat_template)
        return super().apply_chat_template(conversation, template, **kwargs)

    def tokenize(self, texts: list[str], lengths: list[int]) -> list[list[int]]:
        """
        Ids of every text, with `lengths[i]` placeholders for the i-th tag of all texts.

        As in the official code, what stands between two tags is tokenized by itself, BOS included,
        so an image is always followed by a BOS.
        """
        chunks = [IMAGE_TAG.split(text)[::2] for text in texts]
        ids = iter(self.tokenizer([chunk for row in chunks for chunk in row]).input_ids)
        length = iter(lengths)
        rows = []
        for row in chunks:
            tokens = list(next(ids))
            for _ in row[1:]:
                tokens += [self.image_token_id] * next(length)
                tokens += next(ids)
            rows.append(tokens)
        return rows

    def to_dict(self) -> dict:
        # The image processor has a file of its own. With a second one here, the official code fails
        # on transformers 4.43 and 4.51: "got multiple values for argument 'image_processor'".
        output = super().to_dict()
        output.pop("image_processor", None)
        return output

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """
        As the parent, but for the files that other engines and older versions read: there is
        preprocessor_config.json besides, and beside a model, the tokenizer's files are those that
        it was loaded from. Transformers 4 cannot read what transformers 5 writes.
        """
        # Without config.json, transformers 5 goes by the class that tokenizer_config.json names,
        # and in the official one that gives other ids (5.23, LlamaTokenizer).
        beside_a_model = Path(save_directory, "config.json").is_file()
        originals = self._original_tokenizer_files() if beside_a_model else {}
        for name in NOT_OF_A_TOKENIZER:
            self.tokenizer.init_kwargs.pop(name, None)
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.image_processor.processor_class = type(self).__name__
        saved += self.image_processor.save_pretrained(save_directory)
        for name, content in originals.items():
            Path(save_directory, name).write_bytes(content)
        config = json.loads(originals.get("tokenizer_config.json", "{}"))
        if config.get("chat_template") == self.chat_template:
            # One place is enough. Of a file for it, transformers 4.51 makes an argument that the
            # official code does not know.
            Path(save_directory, "chat_template.jinja").unlink(missing_ok=True)
        return saved

    def _original_tokenizer_files(self) -> dict[str, bytes]:
        """
        What the tokenizer was loaded from; nothing where that is gone, or the tokenizer has changed
        since, by added tokens for example.
        """
        base = self.tokenizer.name_or_path
        try:
            paths = {name: cached_file(base, name, **FROM_CACHE) for name in TOKENIZER_FILES}
            theirs = type(self.tokenizer).from_pretrained(Path(paths["tokenizer.json"]).parent)
        except Exception:  # it comes from no folder, or from one that was removed
            return {}
        same = _state(theirs) == _state(self.tokenizer)
        return {name: Path(path).read_bytes() for name, path in paths.items() if path and same}


def _state(tokenizer: PreTrainedTokenizerBase) -> tuple:
    """All that tells tokenizers apart, but how the last call padded and cut."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"padding": None, "truncation": None}
    special = (tokenizer.special_tokens_map, tokenizer.all_special_tokens)
    return (
        backend,
        *special,
        tokenizer.padding_side,
        tokenizer.model_max_length,
        tokenizer.chat_template,
    )


def share_images(images: ImageInput | list[list], tags: list[list[int]]) -> list[list]:
    """
    The images of every text.

    Args:
        images: as in [`Phi3VProcessor.__call__`].
        tags: the numbers of the tags in every text.
    """
    if is_valid_image(images) or isinstance(images, str):
        images = [images]
    images = list(images)
    if any(isinstance(image, list | tuple) for image in images):
        if len(images) != len(tags):
            raise ValueError(f"There are {len(tags)} texts and images for {len(images)}.")
        return [list(own) for own in images]
    if len(tags) == 1:
        return [images]
    wanted = [len(set(numbers)) for numbers in tags]
    if sum(wanted) != len(images):
        raise ValueError(
            f"The texts have tags for {sum(wanted)} images, but there are {len(images)} images."
        )
    rest = iter(images)
    return [[next(rest) for _ in range(count)] for count in wanted]


def check_tags(row: int, numbers: list[int], num_images: int) -> None:
    """
    Raises ValueError unless the tags of text `row` number its images from 1 on, without a gap.
    """
    distinct = sorted(set(numbers))
    if distinct != list(range(1, len(distinct) + 1)):
        raise ValueError(
            f"Text {row}: image tags must be numbered 1, 2, 3, ... without a gap; found {distinct}."
        )
    if len(distinct) != num_images:
        raise ValueError(
            f"Text {row} has tags for {len(distinct)} images, but {num_images} images."
        )


__all__ = ["Phi3VProcessor"]

"""What the caller gives -> the token ids and image features that the model reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optiq.backend import mx
from optiq.engine.features import FeatureCache, content_hash, keys_of
from optiq.engine.messages import ChatOptions, Message, Prompter
from optiq.errors import UsageError
from optiq.models.vision.gemma4 import Gemma4Vision, Picture
from optiq.models.vision.patches import Detail, Patches
from optiq.upstream import TokenizerWrapper


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        tokens: with one id for each soft token of an image.
        features: (P, H), of the P image tokens; None without images.
        keys: what tells the tokens apart, by the content of images; None: their ids.
        marks: lengths from which another prompt is likely to go on, where they were asked for.
    """

    tokens: tuple[int, ...]
    features: mx.array | None = None
    keys: tuple[int, ...] | None = None
    marks: tuple[int, ...] = ()


class Prompts:
    """Prompts of one model.

    Args:
        folder: its directory.
        config: its config.json.
        tokenizer: its tokenizer.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tokenizer: TokenizerWrapper) -> None:
        self._folder, self._config, self._tokenizer = folder, config, tokenizer
        self._text = Prompter(tokenizer, config)
        self._vision: Gemma4Vision | None = None
        self._features: FeatureCache | None = None
        self._image = config.get("image_token_id")

    @property
    def vision(self) -> Gemma4Vision:
        """What makes features of pictures, loaded when it is first needed.

        Raises:
            UsageError: if the directory has no sidecar, or a damaged one.
            UnsupportedModel: if the model has another tower.
        """
        if self._vision is None:
            self._vision = Gemma4Vision(self._folder, self._config)
        return self._vision

    @property
    def has_template(self) -> bool:
        """Whether messages can be given."""
        return bool(self._tokenizer.has_chat_template)

    def raw(
        self, text: str, images: Sequence[Picture] = (), wanted: int | Detail | None = None
    ) -> Prompt:
        """Text to go on with: one BOS where the model wants it; special tokens are parsed.

        Args:
            text: with one image marker for each image.
            images: pictures, paths, or patches with their positions.
            wanted: soft tokens of each at most, or the detail.

        Raises:
            UsageError: if it is empty, the images are not as many as the markers, or one of them
                cannot be read.
        """
        if images:
            self.vision  # noqa: B018  a model that cannot see says so before anything else
        return self._with_images(self._text.raw(text, len(images)).ids, images, wanted)

    def plain(self, text: str) -> tuple[int, ...]:
        """Text in which no token is special, after BOS where the model wants it."""
        return self._text.plain(text)

    def ids(
        self,
        tokens: Sequence[int],
        images: Sequence[Picture] = (),
        wanted: int | Detail | None = None,
    ) -> Prompt:
        """Tokens to go on with, as they are: no BOS is added.

        Args:
            tokens: with one image marker for each image.
            images: pictures, paths, or patches with their positions.
            wanted: soft tokens of each at most, or the detail.

        Raises:
            UsageError: if the images are not as many as the markers, or one cannot be read.
        """
        markers = tokens.count(self._image)
        if markers != len(images):
            raise UsageError(
                f"the prompt has {markers} image markers for {len(images)} images; there must be "
                "one each"
            )
        return self._with_images(tokens, images, wanted)

    def chat(
        self,
        messages: Sequence[Message],
        options: ChatOptions,
        images: Sequence[Picture] = (),
        wanted: int | Detail | None = None,
        *,
        find_marks: bool = False,
    ) -> Prompt:
        """A conversation that waits for the model's turn.

        Args:
            messages: OpenAI style, with a part of type `image` for each image.
            options: tools and thinking.
            images: pictures, paths, or patches with their positions; default: what the parts hold.
            wanted: soft tokens of each at most, or the detail.
            find_marks: say where others may go on; the template is run twice more.

        Raises:
            UsageError: if there is no chat template, it has no place for something, the images are
                not as many as the parts, or one of them cannot be read.
        """
        read = self._text.chat(messages, options)
        held = [image for image in read.images if image is not None]
        if not images and len(held) == len(read.images):
            images = held
        if len(images) != len(read.images):
            raise UsageError(
                f"the messages have {len(read.images)} places for images and {len(images)} images "
                "were given; give one image for each place"
            )
        marks = self._text.marks(messages, options, read.ids) if find_marks else ()
        return self._with_images(read.ids, images, wanted, marks)

    def _with_images(
        self,
        tokens: Sequence[int],
        images: Sequence[Picture],
        wanted: int | Detail | None,
        marks: tuple[int, ...] = (),
    ) -> Prompt:
        """A prompt of which every image token becomes the soft tokens of an image."""
        if not images:
            return Prompt(tuple(tokens), marks=marks)
        patches = [self.vision.patches(image, wanted) for image in images]
        before = [patches[: tokens[:mark].count(self._image)] for mark in marks]
        marks = tuple(
            len(self.vision.expand(tokens[:mark], some))
            for mark, some in zip(marks, before, strict=True)
        )
        return self._seen(self.vision.expand(tokens, patches), patches, marks)

    def expanded(
        self, tokens: Sequence[int], images: Sequence[Picture], wanted: int | Detail | None = None
    ) -> Prompt:
        """A prompt that has an id for each soft token already.

        Raises:
            UsageError: if its runs of image tokens are not those of the images.
        """
        if not images:
            return Prompt(tuple(tokens))
        patches = [self.vision.patches(image, wanted) for image in images]
        self.vision.match(tokens, patches)
        return self._seen(tokens, patches)

    def _seen(
        self, tokens: Sequence[int], patches: Sequence[Patches], marks: tuple[int, ...] = ()
    ) -> Prompt:
        """An expanded prompt with what its images show."""
        if self._features is None:
            self._features = FeatureCache(self.vision.features)
        hashes = [content_hash(each) for each in patches]
        sizes = [len(each.pixels) for each in patches]
        keys = keys_of(tokens, self._image, list(zip(sizes, hashes, strict=True)))
        return Prompt(tuple(tokens), self._features.of(patches, hashes), keys, marks)


def user_message(text: str, num_images: int = 0) -> dict[str, Any]:
    """A user turn with its images in front."""
    if not num_images:
        return {"role": "user", "content": text}
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

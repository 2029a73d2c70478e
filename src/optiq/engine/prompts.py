"""What the caller gives -> the token ids and image features that the model reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optiq.backend import mx
from optiq.data.calibration import needs_bos
from optiq.data.chat import Message, Tool, offers_tools, question
from optiq.errors import UsageError
from optiq.models.vision.gemma4 import Gemma4Vision, Picture
from optiq.models.vision.patches import Detail
from optiq.upstream import TokenizerWrapper


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        tokens: with one id for each soft token of an image.
        features: (P, H), of the P image tokens; None without images.
    """

    tokens: tuple[int, ...]
    features: mx.array | None = None


class Prompts:
    """Prompts of one model.

    Args:
        folder: its directory.
        config: its config.json.
        tokenizer: its tokenizer.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tokenizer: TokenizerWrapper) -> None:
        self._folder, self._config, self._tokenizer = folder, config, tokenizer
        self._bos = tokenizer.bos_token_id if needs_bos(tokenizer, config) else None
        self._image: int | None = config.get("image_token_id")
        self._vision: Gemma4Vision | None = None

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

    def raw(self, text: str) -> list[int]:
        """Text to go on with: one BOS where the model wants it; special tokens are parsed.

        Raises:
            UsageError: if it comes to no token at all.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        if self._bos is not None and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        if not ids:
            raise UsageError("the prompt is empty; give some text")
        return ids

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, thinking: bool = False
    ) -> list[int]:
        """A conversation that waits for the model's turn.

        Raises:
            UsageError: if there is no chat template, or it refuses the conversation or the tools.
        """
        if not messages:
            raise UsageError("there are no messages; give at least one")
        if not self.has_template:
            raise UsageError(f"{self._folder} has no chat template; give the prompt as text")
        if tools and not offers_tools(self._tokenizer):
            raise UsageError(f"the chat template of {self._folder} has no place for tools")
        text = question(self._tokenizer, messages, tools, thinking=thinking)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def with_images(
        self, tokens: Sequence[int], images: Sequence[Picture], wanted: int | Detail | None = None
    ) -> Prompt:
        """A prompt with one image token for each image, in order.

        Args:
            tokens: the prompt.
            images: pictures, paths, or patches with their positions.
            wanted: soft tokens of each at most, or the detail.

        Raises:
            UsageError: if there are not as many places as images, or an image cannot be read.
        """
        if not images:
            places = 0 if self._image is None else list(tokens).count(self._image)
            if places:
                raise UsageError(
                    f"the prompt has {places} places for images and 0 images were given; give one "
                    "image for each place"
                )
            return Prompt(tuple(tokens))
        patches = [self.vision.patches(image, wanted) for image in images]
        expanded = self.vision.expand(tokens, patches)
        return Prompt(tuple(expanded), self._features(patches))

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
        return Prompt(tuple(tokens), self._features(patches))

    def _features(self, patches: Sequence[Any]) -> mx.array:
        features = self.vision.features(patches)
        mx.eval(features)
        return features


def user_message(text: str, num_images: int = 0) -> Message:
    """A user turn with its images in front."""
    if not num_images:
        return {"role": "user", "content": text}
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

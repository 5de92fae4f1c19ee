"""Text from an exported model, token by token: the loop, the choice of tokens, and streaming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from infimm_fast.export.common.runner import ExportedModel


class Decoding(Protocol):
    """One batch of texts being generated."""

    def step(self) -> torch.Tensor:
        """Run the tokens that are new; return the logits ``[B, vocabulary]`` of what follows."""

    def append(self, token: torch.Tensor) -> None:
        """Make ``token [B]`` the next step's."""


class GenerativeModel(ExportedModel):
    """An exported model that answers questions about pictures. A family defines `prepare` and `start`."""

    def prepare(self, images: Any, prompts: list[str], encoded: Any, chat: bool) -> tuple[Mapping[str, torch.Tensor], Any]:
        """Return ``input_ids`` and ``attention_mask`` of prompts, padded on the left, and their pictures encoded."""
        raise NotImplementedError

    def start(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, encoded: Any, max_new_tokens: int) -> Decoding:
        """Return the beginning of a text: nothing was run yet."""
        raise NotImplementedError

    def generate(
        self,
        images: Any,
        prompt: str | list[str],
        *,
        encoded: Any = None,
        chat: bool = True,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str | list[str]:
        """Answer a question about pictures, or several at once.

        Args:
            images: a picture, a list of pictures, a list of lists (one for each prompt), or None.
            prompt: the question, or a list of them.
            encoded: what `encode` made of `images`, to save encoding them again.
            chat: put the prompt into the chat template, pictures first; False takes it as it is, with ``<image>`` where a
                picture stands.
            max_new_tokens: longest answer.
            temperature: 0 for greedy decoding.
            top_p: with a temperature, sample from the most probable tokens that have this probability together.
            seed: of the sampling.

        Returns:
            The answer, or a list of answers.

        Raises:
            ImageCountError: pictures and ``<image>`` tokens do not fit together.
            LimitError: the prompt is longer than the artifact takes.
        """
        single = isinstance(prompt, str)
        inputs, encoded = self.prepare(images, [prompt] if isinstance(prompt, str) else prompt, encoded, chat)
        steps = self.generate_steps(
            inputs["input_ids"],
            inputs["attention_mask"],
            encoded,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        tokens = torch.stack(list(steps), dim=1)
        answers = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return answers[0] if single else answers

    def stream(self, images: Any, prompt: str, **options: Any) -> Iterator[str]:
        """Answer a question about pictures, piece by piece; see `generate`.

        Yields:
            Text as soon as it is complete: a token that ends inside a character waits for the next one.
        """
        inputs, encoded = self.prepare(images, [prompt], options.pop("encoded", None), options.pop("chat", True))
        tokens: list[int] = []
        told = ""
        for step in self.generate_steps(inputs["input_ids"], inputs["attention_mask"], encoded, **options):
            tokens.append(int(step))
            text = self.processor.decode(tokens, skip_special_tokens=True)
            if len(text) > len(told) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(told) :]
                told = text
        rest = self.processor.decode(tokens, skip_special_tokens=True)[len(told) :]
        if rest:
            yield rest

    def generate_tokens(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, encoded: Any = None, **options: Any
    ) -> torch.Tensor:
        """Return the tokens ``[B, n]`` that follow a prompt; see `generate_steps`."""
        return torch.stack(list(self.generate_steps(input_ids, attention_mask, encoded, **options)), dim=1)

    def generate_steps(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        encoded: Any = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Generate token by token.

        Args:
            input_ids: int64 ``[B, T]``, padded on the left.
            attention_mask: int64 ``[B, T]``.
            encoded: the pictures, None for text only.
            max_new_tokens: longest answer.
            temperature: see `generate`.
            top_p: see `generate`.
            seed: see `generate`.

        Yields:
            int64 ``[B]``, the next token of every row; the padding token for rows that have ended.

        Raises:
            LimitError: the prompt and the answer are longer than the artifact takes.
            ImageCountError: a row has more ``<image>`` tokens than pictures.
        """
        decoding = self.start(input_ids, attention_mask, encoded, max_new_tokens)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        ends = torch.tensor(_as_list(self.manifest.generation.get("eos_token_id")), dtype=torch.int64)
        padding = self.manifest.generation.get("pad_token_id") or 0
        running = torch.ones(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            token = torch.where(running, _choose(decoding.step(), temperature, top_p, generator), padding)
            yield token
            running = running & ~torch.isin(token, ends)
            if not running.any():
                return
            decoding.append(token)


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Return the next token of each row, int64 ``[B]``, from logits ``[B, vocabulary]``."""
    if temperature <= 0:
        return logits.argmax(-1)
    values, order = (logits / temperature).softmax(-1).sort(descending=True, dim=-1)
    # A token stays if those before it do not make up top_p yet; the first one always does.
    values = values.masked_fill(values.cumsum(-1) - values > top_p, 0.0)
    return order.gather(1, torch.multinomial(values, 1, generator=generator))[:, 0]

"""generate: from a model on disk and texts to their continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megashear.config import GenerateRun
from megashear.files.regular import read_bytes
from megashear.parallel.agree import check_same
from megashear.parallel.groups import ParallelGroups
from megashear.parallel.launch import distributed
from megashear.tokenizer.chat_template import (
    ChatTemplate,
    TemplateRefusedError,
    chat_template,
    no_template,
    template_of,
)
from megashear.tokenizer.models import Tokenizer
from megashear.tokenizer.turns import check_turns, end_of_turn
from megashear.train.reading import longest_of
from megashear.train.sampling import Sampling
from megashear.train.stored_model import StoredModel, find_model


def generate(config: GenerateRun) -> list[str]:
    """Return every text with its continuation, or with --chat the answer to it.

    Collective over the processes torchrun started.

    Raises:
        ValueError: anything a user can correct.
    """
    prepared = prepare_generate(config)
    with distributed(config.parallel, config.model) as groups:
        return prepared.run(groups)


@dataclass(frozen=True, kw_only=True)
class PreparedTexts:
    """A model and texts to continue, found and checked."""

    config: GenerateRun
    model: StoredModel
    tokenizer: Tokenizer
    texts: Sequence[Sequence[int]]
    """Tokens of each text."""
    turn_end: int | None = None
    """Token that ends an answer too, beside those that end any text."""

    def run(self, groups: ParallelGroups) -> list[str]:
        """Load the model and continue the texts, or answer them. Collective over the world."""
        config = self.config
        check_same({"texts": self.texts, "shape of the model": self.model.shape.to_dict()})
        model, reader = self.model.open_reader(groups, config)
        ends = model.end_tokens(self.tokenizer) | {self.turn_end}
        new = reader.continue_texts(
            self.texts,
            most_new=config.max_new_tokens,
            is_done=lambda tokens: tokens[-1] in ends,
            sampling=Sampling(
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=config.seed,
            ),
        )
        if config.chat:
            return [self.tokenizer.decode(more) for more in new]
        # decoded with the text, for a tokenizer may drop a blank before the first token
        return [self.tokenizer.decode([*text, *more]) for text, more in zip(self.texts, new)]


def prepare_generate(config: GenerateRun) -> PreparedTexts:
    """Prepare `generate` before processes meet.

    Raises:
        ValueError: anything a user can correct.
    """
    model = find_model(load=config.load, load_hf=config.load_hf, masks=config.masks)
    model.check_runnable(config.parallel, config.model)
    tokenizer = model.open_tokenizer(config.tokenizer_model)
    begin = [tokenizer.bos_id] if config.prepend_bos and tokenizer.bos_id is not None else []
    longest, texts = longest_of(model.shape), []
    template, turn_end = None, None
    if config.chat:
        if (found := template_of(tokenizer)) is None:
            raise no_template(tokenizer, "leave --chat out")
        template = chat_template(tokenizer, found)
        check_turns(tokenizer, template)
        turn_end = end_of_turn(tokenizer, template)
    for text in _texts(config):
        if template is None:
            tokens = [*begin, *tokenizer.encode(text)]
        else:
            tokens = _question(text, tokenizer, template)
        if not 0 < len(tokens) < longest:
            raise ValueError(
                f"the text {text[:40]!r} has {len(tokens)} tokens; the model reads up to "
                f"{longest}, and a text to continue must have 1 to {longest - 1}"
            )
        texts.append(tokens)
    return PreparedTexts(
        config=config, model=model, tokenizer=tokenizer, texts=texts, turn_end=turn_end
    )


def _question(text: str, tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Return the tokens of the prompt that asks ``text``.

    Raises:
        ValueError: the template has no prompt for it.
    """
    if spelled := [token for token in tokenizer.special_tokens if token in text]:
        raise ValueError(
            f"--chat: the text {text[:40]!r} spells {spelled[0]!r}, which would be read as the "
            f"template's own; leave it out of the text"
        )
    try:
        prompt = template.prompt([{"role": "user", "content": text}])
    except TemplateRefusedError as error:
        raise ValueError(
            f"--chat: the chat template has no prompt for {text[:40]!r}: {error}; leave --chat out"
        ) from None
    return tokenizer.encode_rendered(prompt)[0]


def _texts(config: GenerateRun) -> list[str]:
    """Return the texts of --prompt and --prompt-file.

    Raises:
        ValueError: the file has none.
    """
    texts = list(config.prompt)
    if config.prompt_file is not None:
        try:
            lines = read_bytes(Path(config.prompt_file), _MOST_BYTES).decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--prompt-file {config.prompt_file} is no text in UTF-8: {error}"
            ) from None
        texts += [line for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"--prompt-file {config.prompt_file} has no line with text")
    return texts


_MOST_BYTES = 2**24
"""Largest --prompt-file, bytes."""

"""A model that ranks share as a model of lm-evaluation-harness, which this module imports."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from megashear.tasks.find import LoadedTasks
from megashear.tokenizer.models import Tokenizer
from megashear.train.reading import Passage, Reader
from megashear.train.sampling import Sampling

_BOOTSTRAP = 1000
"""Draws for the standard error of a metric that has no formula for it: 2 % of the error."""
_MOST_NEW = 256
"""Tokens generated at most where a task does not say. Source: lm_eval's `hf` model."""


def run_tasks(
    model: ReadingModel,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    has_errors: bool = True,
    has_samples: bool = False,
) -> dict[str, Any]:
    """Ask all tasks. Collective over the world.

    Args:
        model: the model.
        tasks: the tasks.
        limit: documents of each task to ask; all unless given.
        has_errors: whether standard errors are wanted, which rank 0 alone calculates.
        has_samples: whether to return what was asked and answered, document by document.

    Returns:
        What `lm_eval.evaluate` returns; equal on every rank but for standard errors.
    """
    is_first = model.reader.groups.rank == 0
    with _quiet(is_first), _own_random_state():
        found = evaluate(
            lm=model,
            task_dict=tasks.begin(),
            limit=limit,
            bootstrap_iters=_BOOTSTRAP if is_first and has_errors else 0,
            log_samples=has_samples,
        )
    assert found is not None, "every rank is the first to the harness"
    return dict(found)


class ReadingModel(TemplateLM):
    """Answers requests of the harness through a `Reader`.

    To the harness every rank is the only one: all ranks make the same requests, and the reader
    shares them out over replicas. If the harness shared out documents, it would draw other
    examples before questions at every number of replicas.

    Args:
        reader: the model.
        tokenizer: of the model.
        ends: tokens that end a text.
        prepend_bos: whether texts begin with the tokenizer's BOS, as transformers' tokenizers of
            models that have one do.
    """

    def __init__(
        self, reader: Reader, tokenizer: Tokenizer, ends: frozenset[int], *, prepend_bos: bool
    ) -> None:
        super().__init__()
        self.reader, self._own_tokenizer, self._ends = reader, tokenizer, ends
        bos = tokenizer.bos_id
        self._begin = [bos] if prepend_bos and bos is not None else []

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return self.reader.longest

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text.

        Raises:
            ValueError: neither the model nor its tokenizer has one.
        """
        if self._own_tokenizer.eos_id is not None:
            return self._own_tokenizer.eos_id
        if not self._ends:
            raise ValueError(
                f"{self._own_tokenizer.path} has neither BOS nor EOS, one of which must precede a "
                f"text that a task asks about; name the tokens in tokenizer_config.json"
            )
        return min(self._ends)

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context."""
        bos = self._own_tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Return the tokens of a text."""
        begin = [] if add_special_tokens is False else self._begin
        return [*begin, *self._own_tokenizer.encode(string)]

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return sum of log-probabilities, and whether all are greedy, of each continuation."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        passages = []
        for _, context, continuation in requests:
            # what is too long loses its beginning
            tokens = ((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :]
            passages.append(Passage(tokens, min(len(continuation), len(tokens) - 1)))
        scores = self.reader.score(passages, what="tasks: scoring")
        return [(score.log_probability, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, read in windows of the model's length."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for context, continuation in map(
                utils.make_disjoint_window,
                utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[number] += log_probability
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text after each context, up to the first of its stops."""
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in by_settings.values():
            contexts = [requests[number].args[0] for number in numbers]
            found = self._generate(contexts, requests[numbers[0]].args[1])
            for number, text in zip(numbers, found):
                texts[number] = text
        return texts

    def _generate(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        settings = normalize_gen_kwargs(asked, _MOST_NEW)
        stops = [stop for stop in handle_stop_sequences(settings.get("until"), None) if stop]
        most_new = settings["max_gen_toks"]
        if most_new >= self.max_length:
            raise ValueError(
                f"a task generates up to {most_new} tokens (max_gen_toks), and the model reads "
                f"{self.max_length}; set max_gen_toks lower in the generation_kwargs of its .yaml"
            )
        decode = self._own_tokenizer.decode
        longest = self.max_length - most_new
        new = self.reader.continue_texts(
            [self.tok_encode(text)[-longest:] or [self.prefix_token_id] for text in contexts],
            most_new=most_new,
            is_done=self._stopper(stops, decode),
            sampling=_sampling(settings),
            what="tasks: generating",
        )
        return [postprocess_generated_text(decode(tokens), stops, None) for tokens in new]

    def _stopper(
        self, stops: Sequence[str], decode: Callable[[Sequence[int]], str]
    ) -> Callable[[Sequence[int]], bool]:
        def is_done(tokens: Sequence[int]) -> bool:
            if tokens[-1] in self._ends:
                return True
            text = decode(tokens)
            return any(stop in text for stop in stops)

        return is_done


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Return how a task's generation_kwargs, normalised, want tokens chosen."""
    top_k = settings.get("top_k")
    return Sampling(
        temperature=settings.get("temperature", 0.0) if settings["do_sample"] else 0.0,
        # 0 and -1 stand for all tokens, as in transformers and vLLM
        top_k=None if top_k is None or top_k <= 0 else top_k,
        top_p=settings.get("top_p"),
    )


@contextlib.contextmanager
def _quiet(is_first: bool) -> Iterator[None]:
    """Keep what the harness prints out of a command's output, and on other ranks out of sight."""
    errors = sys.stderr if is_first else io.StringIO()  # where its bars go too
    with contextlib.redirect_stdout(errors), contextlib.redirect_stderr(errors):
        # or the harness would start a process a core for standard errors
        before = os.environ.get("DISABLE_MULTIPROC")
        os.environ["DISABLE_MULTIPROC"] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ["DISABLE_MULTIPROC"]
            else:
                os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def _own_random_state() -> Iterator[None]:
    """Begin from the harness's seeds, and leave the process's own generators where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

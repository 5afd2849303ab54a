"""The quickstart's tokenizer, trained on the text of its domains."""

from __future__ import annotations

from pathlib import Path

from megashear.quickstart.recipe import VOCABULARY

_LINES = 60_000
"""Lines the tokenizer learns from, about. More lines take longer and change little."""


def train_tokenizer(text: Path, output: Path) -> None:
    """Train a SentencePiece BPE tokenizer on the jsonl files of ``text``.

    It keeps whitespace and newlines, as LLaMA's tokenizer does, so that stock runtimes cut text
    exactly as training did.

    Raises:
        ValueError: ``text`` has no domains, a broken line, or too little text for the vocabulary.
    """
    import sentencepiece

    from megashear.preprocessing.documents import read_texts
    from megashear.preprocessing.inputs import find_domains

    lines = [
        line
        for files in find_domains(text).values()
        for file in files
        for document in read_texts(file, "text")
        for line in document.splitlines()
    ]
    # SentencePiece would draw another sample in every run, and --seed must repeat a run
    sample = lines[:: max(1, len(lines) // _LINES)]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_prefix=str(output.with_suffix("")),
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"{text} does not make a vocabulary of {VOCABULARY} pieces: {error}; give more text"
        ) from None
    output.with_suffix(".vocab").unlink()

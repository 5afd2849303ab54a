"""The table of tags has every tag once, and what makes a tag keeps to its pattern."""

import re

from megashear.monitor import tags


def test_every_tag_is_in_a_section() -> None:
    sections = {tag.partition("/")[0] for tag in tags.MEANINGS}
    assert sections == {"train", "prune", "mix", "eval", "system"}


def test_a_tag_of_a_pattern_holds_its_word() -> None:
    assert tags.churn("head") == "prune/churn/head"
    assert tags.mixture_weight("") == "mix/weight/"
    assert {tags.part_share(part) for part in tags.PAUSES} <= tags.MEANINGS.keys()


def test_every_name_of_the_module_is_another_tag_of_the_table() -> None:
    constants = [v for k, v in vars(tags).items() if k.isupper() and isinstance(v, str)]
    patterns = [tag for tag in tags.MEANINGS if re.search("<.*>", tag)]
    shares = [tags.part_share(part) for part in tags.PAUSES]
    assert sorted(constants + patterns + shares) == sorted(tags.MEANINGS)

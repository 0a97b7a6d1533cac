"""docs/rules: each rule has a card, whose code runs and whose links lead somewhere."""

import re
from pathlib import Path

import pytest

import meprop
import meprop.distributed

FOLDER = Path(__file__).parents[1] / "docs" / "rules"
CARDS = sorted(FOLDER.glob("*.md"))


def rules() -> set[str]:
    own = {name for name in meprop.__all__ if isinstance(getattr(meprop, name), type)}
    found = {name for name in own if issubclass(getattr(meprop, name), meprop.Rule)} - {"Rule"}
    return found | {"SynchronizedTopK"}


def test_each_rule_has_a_card():
    titles = {re.match(r"# `(\w+)`", card.read_text()) for card in CARDS if card.name != "README.md"}
    assert {title[1] for title in titles if title} == rules()
    listed = set(re.findall(r"^\| \[`(\w+)`\]", (FOLDER / "README.md").read_text(), re.MULTILINE))
    assert listed == rules()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_code_of_a_card_makes_rules(card):
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert bool(blocks) != (card.name == "README.md")
    for block in blocks:
        for line in block.strip().splitlines():
            if line.startswith(("meprop.", "Synchronized")):
                assert isinstance(eval(line, {"meprop": meprop, **vars(meprop.distributed)}), meprop.Rule)
            else:
                exec(line)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_the_links_of_a_card_lead_somewhere(card):
    for target, _, place in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", card.read_text())):
        page = (card.parent / target).resolve()
        assert page.exists(), f"{card.name} links to {target}"
        titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE) if place else []
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not place or place in slugs, f"{card.name} links to {target}#{place}"

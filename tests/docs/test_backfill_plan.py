"""The page about backfills shows what the plan of a cluster prints."""

import pytest

from tests.backfill import plan
from tests.support.pages import blocks

PAGE = "docs/explanation/backfill.md"
COMMAND = "$ python -m tests.backfill plan "
SHOWN = [text for language, text in blocks(PAGE) if language == "console"]


@pytest.mark.parametrize("shown", SHOWN)
def test_plans_of_the_page_are_printed(shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, printed = shown.partition("\n")
    assert command.startswith(COMMAND)
    plan.main(command.removeprefix(COMMAND).split())
    assert capsys.readouterr().out == printed


def test_every_plan_of_the_page_is_compared() -> None:
    assert len(SHOWN) == 3


def test_rates_of_the_page_are_about_those_of_the_plan() -> None:
    (rates,) = [text for language, text in blocks(PAGE) if "--open-ms" in text and "$" not in text]
    measured = dict(line.split() for line in rates.splitlines())
    for name, value in plan.Rates().options():
        if name in measured:
            assert float(measured[name]) == pytest.approx(value, rel=0.05), name

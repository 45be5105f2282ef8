"""What a mend changed and what not: two models, the same prompts, every rate with its interval."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import pandas as pd

from qsae_kit.data.companions import companion_of
from qsae_kit.lm.answering import Cost, KnownRows, answer_all, cost, plain_kl
from qsae_kit.lm.hooked import HookedLM, Prompt
from qsae_kit.metrics.reconstruction import Interval, paired_bootstrap, wilson

Role: TypeAlias = Literal["target", "control", "neighbour", "unrelated"]
ROLES: tuple[Role, ...] = get_args(Role)
FACTS, HARMLESS = 100, 100
"""Of those that a model brings along, at most."""
ANSWER_TOKENS = 48


class Group(NamedTuple):
    """Prompts, and what a right answer to each is."""

    name: str
    role: Role
    """target: what the mend is for; control: others in whose interval the target is to come;
    neighbour: what is like the target and is to stay; unrelated: anything else."""
    prompts: Sequence[Prompt]
    right: Sequence[Callable[[str], bool]]
    """One a prompt: whether a text answers it right."""


class Proof(NamedTuple):
    """Two models beside each other."""

    table: pd.DataFrame
    """A row a group: group, role, n, before, before_low, before_high, after, after_low, after_high
    (share of right answers, 95 % Wilson), change, change_low, change_high (after - before, 95 % by
    a bootstrap over the prompts), same (share of answers that are the same to the letter)."""
    plain_kl: float
    """KL(before || after), nats a token, on text outside of any chat."""
    harmless: Cost
    """On harmless prompts: of the first token, and a token of the answers of the model before."""
    n_harmless: int

    @property
    def within_control(self) -> bool:
        """Whether every target's rate lies in the interval of every control, both after."""
        targets, controls = (self.table[self.table["role"] == r] for r in ("target", "control"))
        return all(
            low <= rate <= high
            for rate in targets["after"]
            for low, high in controls[["after_low", "after_high"]].to_numpy()
        )

    @property
    def in_words(self) -> str:
        """What it comes to, made of the table."""
        rows: list[Any] = self.table.to_dict("records")
        targets = [row for row in rows if row["role"] == "target"]
        rest = [row for row in rows if row["role"] != "target"]
        said = [
            f"{row['group']}: {row['before']:.0%} -> {row['after']:.0%} of {row['n']} right"
            f" ({row['after_low']:.0%} to {row['after_high']:.0%})"
            for row in targets
        ]
        if any(row["role"] == "control" for row in rest):
            within = "within" if self.within_control else "not within"
            said.append(f"{within} the control's interval")
        worst = min(rest, key=lambda row: row["change"], default=None)
        if worst is not None:
            change, low, high = (100 * worst[f"change{end}"] for end in ("", "_low", "_high"))
            said.append(
                f"of {len(rest)} other groups {worst['group']} changes most for the worse, by"
                f" {change:+.1f} points ({low:+.1f} to {high:+.1f})"
            )
        costs = f"{self.plain_kl:.2g} nats a token on plain text"
        if self.n_harmless:
            costs += f", {self.harmless.kl_first:.2g} at the first token of harmless prompts"
        return "; ".join([*said, costs]) + "."


def prove(
    before: HookedLM,
    after: HookedLM,
    groups: Sequence[Group],
    n_facts: int = FACTS,
    n_harmless: int = HARMLESS,
    max_new_tokens: int = ANSWER_TOKENS,
    seed: int = 0,
) -> Proof:
    """Asks two models of one shape the same prompts and compares greedy answers, without thinking.

    Questions of fact, harmless prompts and texts that the first model brings along
    (`data.companions`) are added to the groups. Raises ValueError without a target, for a group
    without prompts or of another role, and for models of different vocabularies.
    """
    _check(before, after, groups)
    companion = companion_of(before)
    facts = companion.facts(n_facts, seed) if n_facts else []
    asked = list(groups)
    if facts:
        questions, right = [fact.question for fact in facts], [fact.right for fact in facts]
        asked.append(Group("facts", "unrelated", questions, right))
    rows = [_compared(before, after, group, max_new_tokens, seed) for group in asked]
    n = min(n_harmless, companion.n_prompts("harmless", "evaluation"))
    prompts = [p.text for p in companion.prompts("harmless", n, "evaluation", seed)] if n else []
    return Proof(
        pd.DataFrame(rows),
        plain_kl(before, companion.passages(), [], after),
        _cost(before, after, prompts, max_new_tokens),
        len(prompts),
    )


def _check(before: HookedLM, after: HookedLM, groups: Sequence[Group]) -> None:
    if not any(group.role == "target" for group in groups):
        raise ValueError("No group is the target; give one that the mend is for.")
    for group in groups:
        if group.role not in ROLES:
            raise ValueError(
                f"{group.name!r} has the role {group.role!r}; choose from {', '.join(ROLES)}."
            )
        if not group.prompts or len(group.prompts) != len(group.right):
            raise ValueError(
                f"{group.name!r} has {len(group.prompts)} prompts and {len(group.right)} judges;"
                " give one a prompt, and at least one."
            )
    sizes = [lm.config.vocab_size for lm in (before, after)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"The models have {sizes[0]:,} and {sizes[1]:,} tokens; give two of one vocabulary."
        )


def _compared(
    before: HookedLM, after: HookedLM, group: Group, max_new_tokens: int, seed: int
) -> dict[str, object]:
    said = [
        answer_all(lm, group.prompts, [], max_new_tokens, lm.thinking(False)).text
        for lm in (before, after)
    ]
    old, new = (
        [right(text) for right, text in zip(group.right, texts, strict=True)] for texts in said
    )
    n = len(group.prompts)
    moved = [float(b) - float(a) for a, b in zip(old, new, strict=True)]
    same = sum(a == b for a, b in zip(*said, strict=True)) / n
    return {
        "group": group.name,
        "role": group.role,
        "n": n,
        **_named("before", wilson(sum(old), n)),
        **_named("after", wilson(sum(new), n)),
        **_named("change", paired_bootstrap([moved], [1.0], seed=seed)),
        "same": same,
    }


def _named(name: str, one: Interval) -> dict[str, float]:
    return {name: one.rate, f"{name}_low": one.low, f"{name}_high": one.high}


def _cost(
    before: HookedLM, after: HookedLM, prompts: Sequence[Prompt], max_new_tokens: int
) -> Cost:
    if not prompts:
        return Cost(float("nan"), float("nan"))
    thinking = before.thinking(False)
    answers = answer_all(before, prompts, [], max_new_tokens, thinking).tokens
    rows = [before.chat_tokens(prompt, thinking) for prompt in prompts]
    return cost(KnownRows(before, rows, answers), [], KnownRows(after, rows, answers))

"""Who follows whom among the forks of a search."""

from __future__ import annotations

from specgen_engine.controller.sayings import Sayings


def test_a_fork_follows_the_first_one_that_is_ahead_of_it_on_the_same_words() -> None:
    said = Sayings()
    for fork, ids in {1: [7, 7], 2: [1, 2, 3], 3: [1, 2, 3, 4], 4: [1, 2], 5: [1, 2, 3, 4, 5]}.items():
        said.hear(fork, ids)
    assert said.followed(4) == 2, "a later fork is no example, whatever it has said"
    assert said.followed(3) is None, "the second is behind it"
    assert said.followed(1) is None
    assert said.followed(9) is None
    assert said.tokens(2) == 3
    said.leave(2)
    assert said.followed(4) == 3
    said.let_go(4)
    assert said.followed(4) is None


def test_an_abort_takes_nothing_back() -> None:
    said = Sayings()
    said.hear(1, [1, 2])
    said.hear(1, [])
    assert said.tokens(1) == 2


def test_the_longest_agreement_with_an_earlier_one_counts() -> None:
    said = Sayings()
    for fork, ids in {1: [1, 2, 9], 2: [1, 9], 3: [1, 2, 3], 4: [1, 2, 3]}.items():
        said.hear(fork, ids)
    assert [said.agreed(fork) for fork in (1, 2, 3, 4)] == [None, 1, 2, 3]

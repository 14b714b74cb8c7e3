"""Who holds which page: against a model that keeps plain sets."""

import random

import pytest

from fuyu_jax.generate.pages import Pages


def test_what_is_released_is_found_until_it_is_wanted():
    pages = Pages(4)
    taken = pages.take(2)
    for page, key in zip(taken, (b"a", b"b"), strict=True):
        pages.name(page, key)
    assert pages.find([b"a", b"b"]) == ([], True)  # about to be computed
    pages.ready(taken)
    assert pages.find([b"a", b"b", b"c"]) == (taken, False)
    pages.release(taken)
    assert (pages.available, pages.held) == (3, 0)
    assert pages.find([b"a", b"b"]) == (taken, False)
    pages.take(2)  # the free one, and of the idle ones the end of the beginning
    assert pages.find([b"a", b"b"]) == (taken[:1], False)
    with pytest.raises(IndexError, match="2 pages wanted, 1 available"):
        pages.take(2)


def test_what_was_never_computed_is_not_found():
    pages = Pages(3)
    taken = pages.take(1)
    pages.name(taken[0], b"a")
    pages.release(taken)
    assert pages.find([b"a"]) == ([], False)
    assert pages.available == 2


def test_a_page_with_two_holders_or_a_name_is_not_to_be_written():
    pages = Pages(4)
    (a,), (b,) = pages.take(1), pages.take(1)
    assert not pages.shared(a)
    pages.hold([a])
    pages.name(b, b"b")
    assert pages.shared(a) and pages.shared(b)
    pages.release([a])
    assert not pages.shared(a)


def test_thousands_of_moves_lose_and_double_no_page():
    rng = random.Random(0)
    pages = Pages(40)
    prompts: list[list[int]] = []
    content: dict[int, bytes] = {}  # what each named page was computed for
    for turn in range(4000):
        if prompts and (rng.random() < 0.4 or pages.available < 8):
            pages.release(prompts.pop(rng.randrange(len(prompts))))
        else:
            family = rng.randrange(6)
            keys = [b"%d.%d" % (family, i) for i in range(rng.randrange(1, 7))]
            found, more = pages.find(keys)
            assert not more
            assert [content[p] for p in found] == keys[: len(found)]
            pages.hold(found)
            if (wanted := len(keys) + 1 - len(found)) > pages.available:
                pages.release(found)
                continue
            taken = pages.take(wanted)
            for page in taken:
                content.pop(page, None)
            for page, key in zip(taken, keys[len(found) :], strict=False):
                if key not in content.values():
                    content[page] = key
                pages.name(page, key)
            pages.ready(taken)
            prompts.append(found + taken)
        held = {p for prompt in prompts for p in prompt}
        assert 0 not in held
        assert pages.held == len(held), turn
        assert pages.available == 39 - len(held)
    assert len({k for p in range(6) for k in pages.find([b"%d.0" % p])[0]}) > 1

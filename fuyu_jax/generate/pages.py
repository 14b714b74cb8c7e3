"""Who holds which page of the cache, and which pages hold the beginning of a known prompt.

Pages whose content has a key (a hash of all tokens and images up to their end) are found again by
it, also when nobody holds them any more: they are given to others last, the longest unused first.
"""

import collections
from collections.abc import Sequence


class Pages:
    """The pages of one shard: 1 to `count` - 1 (page 0 is nobody's).

    A page is free, or held by one or more prompts, or idle: held by nobody but found by its key.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, 0, -1))
        self._holders = [0] * count
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._pending: set[int] = set()

    @property
    def available(self) -> int:
        """Pages that could be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.count - 1 - self.available

    def find(self, keys: Sequence[bytes]) -> tuple[list[int], bool]:
        """Pages of the longest known beginning, not held yet; and whether more of it is about to
        be computed, so that waiting would find more."""
        found: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                return found, False
            if page in self._pending:
                return found, True
            found.append(page)
        return found, False

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def take(self, number: int) -> list[int]:
        """So many pages of one holder; what idle ones held is forgotten.

        Raises:
          IndexError: fewer are available.
        """
        if number > self.available:
            raise IndexError(f"{number} pages wanted, {self.available} available")
        taken = []
        for _ in range(number):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def name(self, page: int, key: bytes) -> None:
        """Says what a held page is going to hold; it is found when it is `ready`."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key
            self._pending.add(page)

    def ready(self, pages: Sequence[int]) -> None:
        """They hold what they were named for."""
        self._pending.difference_update(pages)

    def shared(self, page: int) -> bool:
        """Whether writing into it would change another's, or what it is found for."""
        return self._holders[page] > 1 or page in self._key_of

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; the last page of a beginning is forgotten first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._pending:  # it was never computed
                self._pending.discard(page)
                del self._page_of[self._key_of.pop(page)]
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

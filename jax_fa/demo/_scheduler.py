"""Continuous batching on the host: which rows bring which tokens to a step, over which pages.

Plain Python and numpy. The arrays of a `Step` have static shapes: one compiled function runs every
mix.
"""

import collections
import dataclasses
from typing import NamedTuple

import numpy as np


class PageAllocator:
    """The pages `0 .. pages - 1` of a pool; each belongs to one row at a time."""

    def __init__(self, pages):
        self.pages = pages
        self._free = list(reversed(range(pages)))
        self._taken = set()

    @property
    def free(self):
        """How many pages are free."""
        return len(self._free)

    def take(self, count):
        """`count` pages.

        Raises:
          ValueError: if fewer are free; none is taken then.
        """
        if not 0 <= count <= self.free:
            raise ValueError(f"count must be at most the {self.free} free pages, got {count}")
        pages = [self._free.pop() for _ in range(count)]
        self._taken.update(pages)
        return pages

    def give_back(self, pages):
        """Frees `pages`.

        Raises:
          ValueError: if one of them is not taken; none is freed then.
        """
        if len(set(pages)) < len(pages) or not self._taken.issuperset(pages):
            raise ValueError(f"pages must be taken, each once, got {pages}")
        self._taken.difference_update(pages)
        self._free += pages


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
      prompt: Token ids, at least one.
      max_tokens: Tokens of the answer, at most.
      seed: Of its random numbers, which depend on nothing else in the batch.
    """

    prompt: list[int]
    max_tokens: int
    seed: int = 0

    def pages(self, page_size):
        """Pages that hold the prompt and the longest answer, whose last token is not cached."""
        tokens = len(self.prompt) + max(self.max_tokens, 1) - 1
        return -(-tokens // page_size)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is static in a step.

    Attributes:
      rows: Requests that run at once.
      chunk: Tokens of prompts in a step, at most.
      pages: Of the pool.
      page_size: Tokens of a page.
      max_pages: Pages of a row, at most.
    """

    rows: int
    chunk: int
    pages: int
    page_size: int
    max_pages: int

    @staticmethod
    def fit(requests, rows, chunk, page_size, pages=None):
        """For `requests`; `pages`: None takes as many as any `rows` of them need together.

        Raises:
          ValueError: for a request without a prompt, or one that needs more than `pages`.
        """
        needs = [request.pages(page_size) for request in requests]
        if pages is None:
            pages = max(1, sum(sorted(needs)[-rows:]))
        for number, (request, need) in enumerate(zip(requests, needs), 1):
            if not request.prompt:
                raise ValueError(f"prompt {number} must have tokens, got none")
            if need > pages:
                raise ValueError(
                    f"the pool must have the {need} pages of {page_size} tokens that prompt "
                    f"{number} ({len(request.prompt)} tokens) and its answer "
                    f"(up to {request.max_tokens}) need, got {pages}"
                )
        return Sizes(rows, chunk, pages, page_size, max(needs, default=1))


class Step(NamedTuple):
    """What a step needs, all int32.

    Attributes:
      tokens: `[rows + chunk]`: packed, row after row, then padding. One below 0, `-1 - row`, is
        the token that the step before gives that row.
      cu_seqlens: `[rows + 1]`: where each row's tokens begin.
      lengths: `[rows]`: tokens that each row has in the cache already.
      page_table: `[rows, max_pages]`; -1 for no page.
      seeds: `[rows]`.
    """

    tokens: np.ndarray
    cu_seqlens: np.ndarray
    lengths: np.ndarray
    page_table: np.ndarray
    seeds: np.ndarray


@dataclasses.dataclass(eq=False)
class _Row:
    """A request that runs."""

    index: int  # of the request
    request: Request
    pages: list[int]
    cached: int = 0  # tokens in the cache, those of planned steps too
    answer: list[int] = dataclasses.field(default_factory=list)
    expected: int = 0  # tokens that steps give which were planned, not committed
    answered: bool = False

    @property
    def prefills(self):
        return self.cached < len(self.request.prompt)

    @property
    def last_is_planned(self):
        """Whether planned steps give the last token of the longest answer."""
        return self.expected > 0 and len(self.answer) + self.expected >= self.request.max_tokens

    def next_tokens(self, slot, chunk):
        """The next chunk of the prompt, or the last token of the answer, maybe as a reference."""
        if self.prefills:
            return self.request.prompt[self.cached : self.cached + chunk]
        return [-1 - slot] if self.expected else self.answer[-1:]


class _Part(NamedTuple):
    """Of a planned step: what a row has of it."""

    row: _Row
    read: int  # tokens of its prompt
    gives: bool  # a token of its answer


class Scheduler:
    """Decides who runs: `commit(run(plan()))` until `plan` gives None.

    Steps may be planned before the tokens of the last one are known, until `plan` gives None and
    `awaits` is False: a row that may go on then brings the token that the step before gives it. If
    that stops its answer, what the next step gives it counts nothing. Each step must run and be
    committed, in the order of their plans, over one cache.

    Requests are admitted in order. One enters when a row is free, and the pages of its prompt and
    its longest answer are: a row that runs waits for no page, so rows never block each other. Rows
    that decode bring one token to every step. Beside them prompts are read, in order of admission,
    in chunks that always begin at multiples of `chunk`: how a prompt is divided, on which the last
    bits of its attention depend, does not depend on the other rows. A row whose answer ends leaves,
    and its pages are free for the step that is planned next. Steps planned before may still write
    them, but run before it, and a row reads only what it has written itself.

    Args:
      requests: `Request`s that `sizes` fit.
      sizes: The `Sizes` of a step.
      stop: The token id that ends an answer, not part of it; None: none does.

    Attributes:
      allocator: The `PageAllocator`.
      total: Number of requests.
      answered: Those with an answer.
      read: Tokens of prompts so far.
      written: Tokens of answers so far.
      steps: Steps committed so far.
    """

    def __init__(self, requests, sizes, stop=None):
        most = min(sizes.max_pages, sizes.pages)
        if any(not request.prompt or request.pages(sizes.page_size) > most for request in requests):
            raise ValueError(f"each request must fit {sizes} and have a prompt")
        self.sizes, self.stop = sizes, stop
        self.allocator = PageAllocator(sizes.pages)
        self.total = len(requests)
        self.answered = self.read = self.written = self.steps = 0
        self._waiting = collections.deque(enumerate(requests))
        self._rows = [None] * sizes.rows
        self._planned = collections.deque()  # {slot: _Part} of each step that was not committed

    @property
    def running(self):
        """Indices of the requests that have pages."""
        return [row.index for row in self._rows if row is not None]

    @property
    def awaits(self):
        """Whether a step that was planned, not committed, still counts for some row."""
        return any(not part.row.answered for step in self._planned for part in step.values())

    def plan(self):
        """The next `Step`, or None when nothing is left to run before the next `commit`."""
        self._admit()
        chosen = self._choose()
        if not chosen:
            return None
        sizes = self.sizes
        counts = np.zeros(sizes.rows, np.int32)
        lengths, seeds = np.zeros_like(counts), np.zeros_like(counts)
        table = np.full((sizes.rows, sizes.max_pages), -1, np.int32)
        packed = np.zeros(sizes.rows + sizes.chunk, np.int32)
        end, planned = 0, {}
        for slot, tokens in sorted(chosen.items()):
            row = self._rows[slot]
            packed[end : end + len(tokens)] = tokens
            end += len(tokens)
            counts[slot], lengths[slot] = len(tokens), row.cached
            table[slot, : len(row.pages)] = row.pages
            seeds[slot] = np.int64(row.request.seed).astype(np.int32)  # as jax.random.key does
            read = len(tokens) if row.prefills else 0
            row.cached += len(tokens)
            gives = not row.prefills
            row.expected += gives
            planned[slot] = _Part(row, read, gives)
            if row.last_is_planned:
                self._leave(slot)
        self._planned.append(planned)
        return Step(packed, np.append(0, counts).cumsum(dtype=np.int32), lengths, table, seeds)

    def commit(self, tokens):
        """Takes the tokens that the first planned step which was not committed gives its rows.

        Args:
          tokens: int `[rows]`, of which those of rows in the middle of their prompt count nothing.

        Returns:
          The answers that are complete now: `[(index of the request, token ids)]`.

        Raises:
          ValueError: if there is no such step.
        """
        if not self._planned:
            raise ValueError("a step must be planned before its tokens are committed")
        done = []
        for slot, (row, read, gives) in self._planned.popleft().items():
            self.read += read
            if not gives or row.answered:
                continue
            row.expected -= 1
            token = int(tokens[slot])
            if token != self.stop and row.request.max_tokens > 0:
                row.answer.append(token)
                self.written += 1
            if token == self.stop or len(row.answer) >= row.request.max_tokens:
                done.append((row.index, row.answer))
                row.answered = True
                if self._rows[slot] is row:
                    self._leave(slot)
        self.steps += 1
        self.answered += len(done)
        return done

    def cancel(self):
        """Ends the rows that run; their pages are free. Steps not committed count nothing."""
        self._planned.clear()
        for slot, row in enumerate(self._rows):
            if row is not None:
                self._leave(slot)

    def _admit(self):
        for slot, row in enumerate(self._rows):
            if row is not None or not self._waiting:
                continue
            index, request = self._waiting[0]
            need = request.pages(self.sizes.page_size)
            if need > self.allocator.free:
                return
            self._waiting.popleft()
            self._rows[slot] = _Row(index, request, self.allocator.take(need))

    def _choose(self):
        """The new tokens of each row that has some: `{slot: token ids}`."""
        chosen, room = {}, self.sizes.chunk
        running = [(slot, row) for slot, row in enumerate(self._rows) if row is not None]
        for slot, row in sorted(running, key=lambda pair: pair[1].index):
            tokens = row.next_tokens(slot, self.sizes.chunk)
            if row.prefills:
                if len(tokens) > room:
                    continue
                room -= len(tokens)
            chosen[slot] = tokens
        return chosen

    def _leave(self, slot):
        row, self._rows[slot] = self._rows[slot], None
        self.allocator.give_back(row.pages)

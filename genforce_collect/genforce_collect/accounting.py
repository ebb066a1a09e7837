"""What was lost, exactly: the samples a producer numbered against those that arrived."""

from __future__ import annotations

from collections.abc import Sequence

UNNUMBERED_NS = 20_000_000_000  # a stream without a report for so long is not numbered


class StreamAccount:
    """Compares one stream's samples with its StreamTimes reports, by stamp.

    Both may arrive in any order. Samples stamped before `start_ns` are no part of the account:
    whether they were published before the recording began cannot be told. Not thread-safe.
    """

    def __init__(self, start_ns: int) -> None:
        self.received = 0  # samples, whether reported or not
        self.reported = 0  # samples their producer spoke of
        self._start_ns = start_ns
        self._next_seq: int | None = None
        self._gap = 0  # samples whose report never came
        # Stamp -> reports minus samples; balanced stamps are dropped.
        self._open: dict[int, int] = {}
        self._oldest_ns = 0  # of the open ones, while there are no reports

    def sample(self, stamp_ns: int) -> None:
        """A sample arrived."""
        self.received += 1
        if not self._open:
            self._oldest_ns = stamp_ns
        self._balance(stamp_ns, -1)
        if not self.reported and stamp_ns - self._oldest_ns > UNNUMBERED_NS:
            self._open.clear()

    def report(self, first_seq: int, stamps_ns: Sequence[int]) -> None:
        """A report arrived: the stamps of the samples numbered from `first_seq` on."""
        if self._next_seq is not None and first_seq > self._next_seq:
            self._gap += first_seq - self._next_seq
        self._next_seq = first_seq + len(stamps_ns)
        for stamp_ns in stamps_ns:
            if stamp_ns >= self._start_ns:
                self.reported += 1
            self._balance(stamp_ns, 1)

    def lost_stamps(self, until_ns: int) -> list[int]:
        """Stamps (ns) up to `until_ns` of samples that were reported and did not arrive."""
        return [s for s, n in self._open.items() if n > 0 and s <= until_ns for _ in range(n)]

    def lost(self, until_ns: int) -> int:
        """Number of samples up to `until_ns` that did not arrive, including those whose report
        did not arrive either.
        """
        unreported = sum(-n for n in self._open.values() if n < 0)
        return len(self.lost_stamps(until_ns)) + max(0, self._gap - unreported)

    def settled(self, until_ns: int) -> bool:
        """Whether every sample up to `until_ns` has been reported (or the stream is unnumbered)
        and every report has its sample.
        """
        if not self.reported:
            return True
        return all(stamp > until_ns for stamp in self._open)

    def _balance(self, stamp_ns: int, change: int) -> None:
        if stamp_ns < self._start_ns:
            return
        balance = self._open.get(stamp_ns, 0) + change
        if balance:
            self._open[stamp_ns] = balance
        else:
            del self._open[stamp_ns]

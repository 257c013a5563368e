//! Queue of the rows of an endpoint: fresh rows in order, and delayed retries. Pure.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use tokio::time::Instant;

/// A row with the history of its attempts in this run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueuedRow {
    /// Index in [`crate::plan::Plan::rows`].
    pub row: usize,
    /// Number of failed attempts that count towards `retry.max_attempts`. Throttled attempts, attempts in an outage,
    /// and endpoint refusals that are tried again do not count. In an outage, a row may get some attempts back.
    pub failed: u32,
    /// Number of attempts, except endpoint refusals, that may have been billed without an answer.
    pub paid: u32,
    /// Number of replies that throttled this row.
    pub throttled: u32,
    /// Number of endpoint refusals of this row: replies that blame the endpoint (key, credit, address, model), not the
    /// row. A suspect of an earlier run starts with 1.
    pub endpoint_refusals: u32,
    /// Time of the first reply that throttled this row.
    pub throttled_at: Option<Instant>,
}

impl QueuedRow {
    /// Creates an entry for a row without attempts.
    pub fn fresh(row: usize) -> QueuedRow {
        QueuedRow {
            row,
            ..QueuedRow::default()
        }
    }

    /// Sum of all counts, to compare rows. A failure that may have been billed counts twice.
    fn setbacks(&self) -> u32 {
        self.failed + self.paid + self.throttled + self.endpoint_refusals
    }
}

/// Rows of an endpoint that are not in flight and have no outcome yet.
pub(crate) struct RowQueue {
    /// Ranges of rows that were never sent, ascending, none of them empty.
    fresh: Vec<Range<usize>>,
    /// Retries with their earliest time, earliest first.
    delayed: BinaryHeap<Reverse<(Instant, QueuedRow)>>,
}

impl RowQueue {
    /// Creates a queue of fresh rows.
    pub(crate) fn new(rows: Range<usize>) -> Self {
        Self {
            fresh: Vec::from_iter(Some(rows).filter(|rows| !rows.is_empty())),
            delayed: BinaryHeap::new(),
        }
    }

    /// Returns the number of rows in the queue.
    pub(crate) fn len(&self) -> usize {
        self.fresh.iter().map(Range::len).sum::<usize>() + self.delayed.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.delayed.is_empty()
    }

    /// Adds a retry that is due at `not_before`.
    pub(crate) fn delay(&mut self, entry: QueuedRow, not_before: Instant) {
        self.delayed.push(Reverse((not_before, entry)));
    }

    /// Returns the next row, a due retry before a fresh row. If no row is due, the error is the instant at which
    /// the first retry is due, or `None` if there is no retry.
    pub(crate) fn peek(&self, now: Instant) -> Result<QueuedRow, Option<Instant>> {
        let due = self.delayed.peek().map(|Reverse(delayed)| *delayed);
        match due {
            Some((not_before, entry)) if not_before <= now => Ok(entry),
            _ => match self.fresh.first() {
                Some(rows) => Ok(QueuedRow::fresh(rows.start)),
                None => Err(due.map(|(not_before, _)| not_before)),
            },
        }
    }

    /// Returns the row that is least likely to be the cause of a failure, so that its result shows the state of the
    /// endpoint. A fresh row comes before all retries. Of the due retries, rows that are not failing come first, then
    /// rows with the fewest setbacks. If no row is due, the error is that of [`RowQueue::peek`].
    ///
    /// `is_failing` returns true for rows that have failed since the endpoint's last success. Rows that fail may be
    /// neighbours: with `from_middle`, the fresh row is taken from the middle of the longest range instead of the
    /// beginning of the first one.
    pub(crate) fn peek_least_suspect(
        &self,
        now: Instant,
        is_failing: impl Fn(usize) -> bool,
        from_middle: bool,
    ) -> Result<QueuedRow, Option<Instant>> {
        let fresh = if from_middle {
            let longest = self.fresh.iter().max_by_key(|rows| rows.len());
            longest.map(|rows| rows.start + rows.len() / 2)
        } else {
            self.fresh.first().map(|rows| rows.start)
        };
        if let Some(row) = fresh {
            return Ok(QueuedRow::fresh(row));
        }
        let due = self.delayed.iter().map(|Reverse(delayed)| delayed);
        let due = due.filter(|(not_before, _)| *not_before <= now);
        let suspicion = |(not_before, entry): &&(Instant, QueuedRow)| {
            (is_failing(entry.row), entry.setbacks(), *not_before)
        };
        match due.min_by_key(suspicion) {
            Some((_, entry)) => Ok(*entry),
            None => self.peek(now),
        }
    }

    /// Returns true if the queue has no fresh rows and every retry satisfies `predicate`.
    pub(crate) fn all(&self, predicate: impl Fn(&QueuedRow) -> bool) -> bool {
        let mut delayed = self.delayed.iter();
        self.fresh.is_empty() && delayed.all(|Reverse((_, entry))| predicate(entry))
    }

    /// Removes the retries of a row.
    pub(crate) fn remove(&mut self, row: usize) {
        self.delayed.retain(|Reverse((_, entry))| entry.row != row);
    }

    /// Removes an entry that [`RowQueue::peek`] or [`RowQueue::peek_least_suspect`] returned.
    pub(crate) fn take(&mut self, entry: QueuedRow) {
        let index = self.fresh.iter().position(|rows| rows.contains(&entry.row));
        if let Some(index) = index.filter(|_| entry == QueuedRow::fresh(entry.row)) {
            let rows = self.fresh[index].clone();
            let around = [rows.start..entry.row, entry.row + 1..rows.end];
            let remaining = around.into_iter().filter(|rows| !rows.is_empty());
            self.fresh.splice(index..=index, remaining);
            return;
        }
        match self.delayed.peek() {
            Some(Reverse((_, first))) if *first == entry => {
                self.delayed.pop();
            }
            _ => self.delayed.retain(|Reverse((_, other))| *other != entry),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn peek_returns_due_retries_before_fresh_rows() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut queue = RowQueue::new(0..2);
        let first = queue.peek(now).unwrap();
        assert_eq!(first.row, 0);
        queue.take(first);
        let retry = QueuedRow { failed: 1, ..first };
        queue.delay(retry, at(5));

        let second = queue.peek(now).unwrap();
        assert_eq!(second.row, 1);
        assert_eq!(queue.peek(at(5)), Ok(retry));
        queue.take(second);
        assert_eq!(queue.peek(now), Err(Some(at(5))));
        assert!(!queue.is_empty());
        queue.take(retry);
        assert_eq!(queue.peek(at(9)), Err(None));
        assert!(queue.is_empty());
    }

    #[test]
    fn peek_least_suspect_prefers_rows_without_failures() {
        let now = Instant::now();
        let mut queue = RowQueue::new(2..3);
        let entry = |row, failed| QueuedRow {
            failed,
            ..QueuedRow::fresh(row)
        };
        queue.delay(entry(0, 5), now);
        queue.delay(entry(1, 1), now);
        let fresh = queue.peek_least_suspect(now, |_| false, false).unwrap();
        assert_eq!(fresh, QueuedRow::fresh(2));
        queue.take(fresh);
        let other = queue.peek_least_suspect(now, |row| row == 1, true).unwrap();
        assert_eq!(other, entry(0, 5), "row 1 failed recently");
        let least = queue.peek_least_suspect(now, |_| true, false).unwrap();
        assert_eq!(least, entry(1, 1));
        queue.take(least);
        assert_eq!((queue.len(), queue.peek(now)), (1, Ok(entry(0, 5))));
    }

    #[test]
    fn peek_least_suspect_takes_the_first_fresh_row_or_the_middle_of_the_longest_range() {
        let now = Instant::now();
        let mut queue = RowQueue::new(0..8);
        let order = [
            (false, 0),
            (true, 4),
            (true, 6),
            (false, 1),
            (true, 3),
            (true, 7),
            (true, 5),
            (false, 2),
        ];
        for (rows_taken, (from_middle, expected)) in order.into_iter().enumerate() {
            assert_eq!(queue.len(), 8 - rows_taken);
            let entry = queue
                .peek_least_suspect(now, |_| false, from_middle)
                .unwrap();
            assert_eq!(entry, QueuedRow::fresh(expected));
            queue.take(entry);
        }
        assert!(queue.is_empty() && queue.all(|_| false));
    }
}

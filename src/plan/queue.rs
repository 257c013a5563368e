//! The rows that wait: fresh ones in order, and retries until their time has come.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use tokio::time::Instant;

/// A row with its history.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueuedRow {
    /// Index in [`crate::plan::Plan::rows`].
    pub row: usize,
    /// Attempts that failed for a reason of their own; throttling and an outage are none.
    pub failed: u32,
    /// Attempts of this run that may have been billed and brought no answer.
    pub paid: u32,
    /// Times that the endpoint asked to wait on this row's account.
    pub throttled: u32,
    /// Times that its reply said that no request can succeed.
    pub claimed: u32,
    /// When the first of [`Entry::throttled`] was.
    pub throttled_at: Option<Instant>,
}

impl QueuedRow {
    /// A row that has not been tried.
    pub fn fresh(row: usize) -> QueuedRow {
        QueuedRow {
            row,
            ..QueuedRow::default()
        }
    }

    /// Replies that were not answers.
    fn setbacks(&self) -> u32 {
        self.failed + self.paid + self.throttled + self.claimed
    }
}

pub(crate) struct RowQueue {
    /// In order, none of them empty.
    fresh: Vec<Range<usize>>,
    /// Earliest first.
    delayed: BinaryHeap<Reverse<(Instant, QueuedRow)>>,
}

impl RowQueue {
    /// All of these rows, fresh.
    pub(crate) fn new(rows: Range<usize>) -> Self {
        Self {
            fresh: Vec::from_iter(Some(rows).filter(|rows| !rows.is_empty())),
            delayed: BinaryHeap::new(),
        }
    }

    /// Rows that wait.
    pub(crate) fn len(&self) -> usize {
        self.fresh.iter().map(Range::len).sum::<usize>() + self.delayed.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.delayed.is_empty()
    }

    /// Puts a row back until `not_before`.
    pub(crate) fn delay(&mut self, entry: QueuedRow, not_before: Instant) {
        self.delayed.push(Reverse((not_before, entry)));
    }

    /// The row whose turn it is, or the instant at which there may be one (None: not before
    /// another is put back). Retries that are due go first: they have waited.
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

    /// As [`Queue::peek`], of the row that has least to do with what is wrong: those that always fail must
    /// not be all that is tried of an endpoint. `is_failing` says whether a row has failed of late. Rows that
    /// fail may be neighbours: if `is_far` is set, the fresh one that is farthest from those that were taken.
    pub(crate) fn peek_least_suspect(
        &self,
        now: Instant,
        is_failing: impl Fn(usize) -> bool,
        is_far: bool,
    ) -> Result<QueuedRow, Option<Instant>> {
        let fresh = if is_far {
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

    /// Returns true if every row that waits is one of these.
    pub(crate) fn all(&self, is_one: impl Fn(&QueuedRow) -> bool) -> bool {
        let mut delayed = self.delayed.iter();
        self.fresh.is_empty() && delayed.all(|Reverse((_, entry))| is_one(entry))
    }

    /// Takes a row out that was put back.
    pub(crate) fn remove(&mut self, row: usize) {
        self.delayed.retain(|Reverse((_, entry))| entry.row != row);
    }

    /// Takes what one of the two has shown.
    pub(crate) fn take(&mut self, entry: QueuedRow) {
        let at = self.fresh.iter().position(|rows| rows.contains(&entry.row));
        if let Some(at) = at.filter(|_| entry == QueuedRow::fresh(entry.row)) {
            let rows = self.fresh[at].clone();
            let around = [rows.start..entry.row, entry.row + 1..rows.end];
            let left = around.into_iter().filter(|rows| !rows.is_empty());
            self.fresh.splice(at..=at, left);
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
    fn due_retries_go_first_and_others_wait_their_time() {
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
    fn an_endpoint_is_tried_with_rows_that_have_not_failed() {
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
        assert_eq!(other, entry(0, 5), "it failed longer ago");
        let least = queue.peek_least_suspect(now, |_| true, false).unwrap();
        assert_eq!(least, entry(1, 1));
        queue.take(least);
        assert_eq!((queue.len(), queue.peek(now)), (1, Ok(entry(0, 5))));
    }

    #[test]
    fn the_next_fresh_row_is_the_first_or_one_from_the_middle() {
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
        for (taken, (is_far, expected)) in order.into_iter().enumerate() {
            assert_eq!(queue.len(), 8 - taken);
            let entry = queue.peek_least_suspect(now, |_| false, is_far).unwrap();
            assert_eq!(entry, QueuedRow::fresh(expected));
            queue.take(entry);
        }
        assert!(queue.is_empty() && queue.all(|_| false));
    }
}

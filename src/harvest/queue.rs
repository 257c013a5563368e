//! The rows that wait: fresh ones in order, and retries until their time has come.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use tokio::time::Instant;

/// A row with its history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Index in [`super::plan::Plan::rows`].
    pub row: usize,
    /// Attempts that failed for a reason of their own; throttling and an outage are none.
    pub failed: u32,
    /// Times that the endpoint asked to wait on this row's account.
    pub throttled: u32,
}

impl Entry {
    /// A row that has not been tried.
    pub fn fresh(row: usize) -> Entry {
        Entry {
            row,
            failed: 0,
            throttled: 0,
        }
    }
}

pub struct Queue {
    fresh: Range<usize>,
    /// Earliest first.
    delayed: BinaryHeap<Reverse<(Instant, Entry)>>,
}

impl Queue {
    /// All of these rows, fresh.
    pub fn new(rows: Range<usize>) -> Self {
        Self {
            fresh: rows,
            delayed: BinaryHeap::new(),
        }
    }

    /// Rows that wait.
    pub fn len(&self) -> usize {
        self.fresh.len() + self.delayed.len()
    }

    pub fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.delayed.is_empty()
    }

    /// Puts a row back until `not_before`.
    pub fn delay(&mut self, entry: Entry, not_before: Instant) {
        self.delayed.push(Reverse((not_before, entry)));
    }

    /// The row whose turn it is, or the instant at which there may be one (None: not before
    /// another is put back). Retries that are due go first: they have waited.
    pub fn peek(&self, now: Instant) -> Result<Entry, Option<Instant>> {
        let due = self.delayed.peek().map(|Reverse(delayed)| *delayed);
        match due {
            Some((not_before, entry)) if not_before <= now => Ok(entry),
            _ if !self.fresh.is_empty() => Ok(Entry::fresh(self.fresh.start)),
            _ => Err(due.map(|(not_before, _)| not_before)),
        }
    }

    /// Takes what [`Queue::peek`] has shown.
    pub fn take(&mut self, entry: Entry) {
        match self.delayed.peek() {
            Some(Reverse((_, first))) if *first == entry => {
                self.delayed.pop();
            }
            _ => self.fresh.start += 1,
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
        let mut queue = Queue::new(0..2);
        let first = queue.peek(now).unwrap();
        assert_eq!(first.row, 0);
        queue.take(first);
        let retry = Entry { failed: 1, ..first };
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
}

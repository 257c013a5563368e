//! Progress text of batch mode: batches by status, and the amount spent.

use std::collections::BTreeMap;

use super::BatchRun;
use crate::terminal::{format_dollars, sanitise};

impl BatchRun<'_> {
    /// Updates the progress text.
    pub(super) fn show_progress(&mut self) {
        let prices = self
            .upstreams
            .iter()
            .map(|upstream| &upstream.settings.price);
        self.run_files.summarise(prices, &mut self.summary);
        let parts = self.parts_under_way();
        let summary = &self.summary;
        self.progress.update(summary.done(), || {
            let mut texts: Vec<String> = parts
                .iter()
                .map(|(status, count)| format!("{count} {}", sanitise(status)))
                .collect();
            if texts.is_empty() {
                texts.push("no batch under way".into());
            }
            if let Some(dollars) = summary.run_folder_usd {
                texts.push(match summary.budget_usd {
                    Some(cap) => format!("{} of {}", format_dollars(dollars), format_dollars(cap)),
                    None => format_dollars(dollars),
                });
            }
            texts.join(", ")
        });
    }

    /// Counts the parts that have not ended, by status.
    pub(super) fn parts_under_way(&self) -> BTreeMap<String, u64> {
        let mut parts = BTreeMap::new();
        for part in self.journal.parts.iter().filter(|part| !part.is_done()) {
            let status = match part.progress.status.as_str() {
                "" if part.batch().is_some() => "under way",
                "" => "not created yet",
                status => status,
            };
            *parts.entry(status.to_owned()).or_default() += 1;
        }
        parts
    }
}

//! Ticket of a sent request.

use crate::rate_limit::cost::RequestCost;
use crate::rate_limit::headers::Resource;
use tokio::time::Instant;

/// Time and charges of a sent request, with which its reply is interpreted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SendTicket {
    pub at: Instant,
    pub(crate) cost: RequestCost,
    /// Total charged to each bucket so far, this request included.
    pub(crate) charged: [f64; Resource::ALL.len()],
}

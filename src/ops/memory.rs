//! The allocator's habits.

/// Tells glibc to keep large blocks instead of giving each back to the system.
///
/// A training step allocates and frees the same large tensors over and over; by default glibc maps
/// and unmaps each one, and the page faults cost up to 40 % of a step. Without effect on other
/// allocators.
pub fn keep_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets two tunables of the allocator and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

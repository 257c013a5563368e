//! What the arithmetic asks of the allocator and of candle's threads, once, at the start.

/// Makes the process fit for training. Call it first in `main`, before any thread is started.
///
/// glibc keeps large blocks instead of giving each back to the system. The passes of a training take
/// their memory from an arena, but what candle allocates (weights while they load, and everything
/// where its own operations run) would be mapped anew each time, page by page.
///
/// candle's own element-wise operations stay on the calling thread. They would start a second
/// pool whose threads wait by spinning, on the cores that the operations of this room compute on;
/// on two cores that halves the speed of training a small model. A value that the user has set
/// stays.
pub fn set_up() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets two tunables of the allocator and may be called at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
    const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(CANDLE_THREADS).is_none() {
        // SAFETY: no other thread exists yet that could read the environment at the same time.
        unsafe { std::env::set_var(CANDLE_THREADS, "1") };
    }
}

//! An arena allocator: memory that is reused by every training step.
//!
//! A step allocates and drops many large buffers. The general allocator would map each buffer, fault it in page
//! by page and unmap it. In an arena, a buffer is a range of a block that stays mapped. Allocation is first-fit
//! from the lowest address, so the memory in use stays dense: gradients take the space of activations that were
//! dropped. Blocks request huge pages.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use candle_core::Result;
use memmap2::{MmapMut, MmapOptions};

use super::lock;

/// Values per block: 256 MiB of address space, of which untouched pages use no memory.
const BLOCK_LEN: usize = 1 << 26;
/// Alignment of buffers, in values: a cache line.
const ALIGNMENT: usize = 16;

/// A handle of an arena. Clones share the memory.
#[derive(Clone, Default)]
pub struct Arena(Arc<Mutex<Vec<ArenaBlock>>>);

struct ArenaBlock {
    map: MmapMut,
    /// Lengths of the free ranges by their starts, in values. No two ranges are adjacent.
    free: BTreeMap<usize, usize>,
}

/// A range of values in an arena, which is freed when the buffer is dropped.
pub struct Buffer {
    arena: Arena,
    /// Index of the block in the arena.
    block: usize,
    /// Start of the range in its block, in values.
    start: usize,
    len: usize,
    values: NonNull<f32>,
}

// SAFETY: a buffer owns its range as a Box would: the arena allocates a range once, and frees it
// when the buffer is dropped.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Buffer {}

impl Arena {
    /// Allocates `len` values with arbitrary content: the caller must write all of them. Debug
    /// builds fill the buffer with NaN, which exposes reads of unwritten values.
    ///
    /// # Errors
    /// Where the system is out of memory.
    pub fn take(&self, len: usize) -> Result<Buffer> {
        #[cfg_attr(not(debug_assertions), expect(unused_mut))]
        let mut buffer = self.allocate(len)?;
        #[cfg(debug_assertions)]
        buffer.fill(f32::NAN);
        Ok(buffer)
    }

    /// Allocates `len` zeros.
    ///
    /// # Errors
    /// As [`Arena::take`].
    pub fn zeros(&self, len: usize) -> Result<Buffer> {
        let mut buffer = self.allocate(len)?;
        buffer.fill(0.0);
        Ok(buffer)
    }

    fn allocate(&self, len: usize) -> Result<Buffer> {
        let size = len.max(1).next_multiple_of(ALIGNMENT);
        let mut blocks = lock(&self.0);
        let free_range = blocks
            .iter_mut()
            .enumerate()
            .find_map(|(index, block)| Some((index, block.allocate(size)?)));
        let (index, start) = match free_range {
            Some(range) => range,
            None => {
                let mut block = ArenaBlock::new(size.max(BLOCK_LEN))?;
                let start = block.allocate(size).unwrap_or_default();
                blocks.push(block);
                (blocks.len() - 1, start)
            }
        };
        let base = blocks[index].map.as_mut_ptr().cast::<f32>();
        // SAFETY: `ArenaBlock::allocate` returned a range inside the block, whose mapping is page-aligned, never
        // moves, and lives as long as the arena, which the buffer holds.
        let values = unsafe { NonNull::new_unchecked(base.add(start)) };
        Ok(Buffer {
            arena: self.clone(),
            block: index,
            start,
            len,
            values,
        })
    }
}

impl ArenaBlock {
    fn new(len: usize) -> Result<Self> {
        let map = MmapOptions::new()
            .len(len * size_of::<f32>())
            .no_reserve_swap()
            .map_anon()
            .map_err(|error| {
                candle_core::Error::Msg(format!(
                    "cannot allocate another {} MiB: {error}",
                    (len * size_of::<f32>()) >> 20
                ))
            })?;
        #[cfg(target_os = "linux")]
        // Only a hint for speed: failure is harmless.
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self {
            map,
            free: BTreeMap::from([(0, len)]),
        })
    }

    /// Allocates `size` values from the lowest free range that is large enough. Returns the start of the allocated
    /// range, or None if no free range is large enough.
    fn allocate(&mut self, size: usize) -> Option<usize> {
        let (&start, &len) = self.free.iter().find(|(_, len)| **len >= size)?;
        self.free.remove(&start);
        if len > size {
            self.free.insert(start + size, len - size);
        }
        Some(start)
    }

    /// Frees a range and merges it with free neighbours.
    fn free_range(&mut self, mut start: usize, mut size: usize) {
        if let Some(next_len) = self.free.remove(&(start + size)) {
            size += next_len;
        }
        if let Some((&previous, &len)) = self.free.range(..start).next_back()
            && previous + len == start
        {
            start = previous;
            size += len;
        }
        self.free.insert(start, size);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let size = self.len.max(1).next_multiple_of(ALIGNMENT);
        lock(&self.arena.0)[self.block].free_range(self.start, size);
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: only this buffer refers to the range, and mapped memory is zero-initialised.
        unsafe { std::slice::from_raw_parts(self.values.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.values.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arena_buffers_do_not_overlap_and_are_reused() {
        let arena = Arena::default();
        let mut random = fastrand::Rng::with_seed(1);
        let mut live: Vec<(Buffer, f32)> = Vec::new();
        for round in 0..2000 {
            if live.len() > 40 || (random.bool() && !live.is_empty()) {
                let (buffer, mark) = live.swap_remove(random.usize(..live.len()));
                assert!(buffer.iter().all(|v| *v == mark), "overwritten");
            } else {
                let mut buffer = arena.zeros(random.usize(0..5000)).expect("memory");
                assert!(buffer.iter().all(|v| *v == 0.0));
                buffer.fill(round as f32);
                live.push((buffer, round as f32));
            }
        }
        live.clear();
        let blocks = lock(&arena.0);
        assert_eq!(blocks.len(), 1);
        assert_eq!(
            blocks[0].free,
            BTreeMap::from([(0, BLOCK_LEN)]),
            "free ranges were not merged"
        );
    }

    #[test]
    fn arena_takes_lowest_free_range_and_gives_large_requests_their_own_block() {
        let arena = Arena::default();
        let [a, b] = [100, 50].map(|len| arena.take(len).expect("memory"));
        let lowest_address = a.values;
        drop(a);
        let c = arena.take(60).expect("memory");
        assert_eq!(c.values, lowest_address);
        drop(b);
        let large = arena.take(BLOCK_LEN + 1).expect("memory");
        assert_eq!((large.block, large.len()), (1, BLOCK_LEN + 1));
    }
}

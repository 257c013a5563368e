//! Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Hugging
//! Face: channel i turns with channel i + C/2.

/// cos and sin of every (position, frequency).
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// (positions x C/2)
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

/// Which way to turn: the backward pass of a rotation is the opposite rotation.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    Forward,
    Backward,
}

impl RopeTable {
    /// `inverse_frequencies` (C/2) in radians per position; angles are taken in f32, as the models
    /// were trained.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let angles: Vec<f32> = (0..positions)
            .flat_map(|position| inverse_frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        Self {
            cos: angles.iter().map(|a| a.cos()).collect(),
            sin: angles.iter().map(|a| a.sin()).collect(),
            half: inverse_frequencies.len(),
        }
    }

    /// Positions that the table covers.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Turns the heads of one token (a multiple of C channels) at `position`, in place.
    pub fn turn(&self, heads: &mut [f32], position: usize, turn: Turn) {
        let range = position * self.half..(position + 1) * self.half;
        let (cos, sin) = (&self.cos[range.clone()], &self.sin[range]);
        let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
        for head in heads.chunks_exact_mut(2 * self.half) {
            let (a, b) = head.split_at_mut(self.half);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let (x, y, sin) = (*a, *b, sin * sign);
                *a = x * cos - y * sin;
                *b = y * cos + x * sin;
            }
        }
    }
}

//! Passes over whole sequences: for training, and for evaluation.

use anyhow::{Result, bail};
use candle_core::{DType, Tensor};
use std::ops::Range;

use super::composed::{Composed, pass};
use super::gradients::Gradients;
use super::tape::{Keys, Memory, Tape};
use super::{Frame, Input, Model};
use crate::ops::Values;
use crate::ops::arena::Buffer;
use crate::ops::head_loss::{self, CHUNK, Units};
use crate::ops::matmul::Precision;

impl Model {
    /// Gradients of the variables among the weights: none yet.
    pub fn gradients(&self) -> Gradients {
        Gradients::new(self.arena.clone())
    }

    /// One training pass: calls `rows` with the indices and the logits (n x V) of each unit of
    /// positions, which it turns into their gradient, adds the gradients of all variables to
    /// `gradients`, and returns what `rows` said, in order. No more than a chunk of logits exists at a
    /// time.
    ///
    /// `memory` is [`Memory::Record`] or [`Memory::Checkpoint`]; only the tape heeds it.
    ///
    /// # Errors
    /// Where an id is past the vocabulary or a segment longer than the model's context.
    pub fn train_pass<R: Send>(
        &self,
        input: Input,
        units: &Units,
        memory: Memory,
        rows: impl Fn(Range<usize>, &mut [f32]) -> Vec<R> + Sync,
        gradients: &mut Gradients,
    ) -> Result<Vec<R>> {
        if self.frame == Frame::Composed {
            let hidden = self.composed_hidden(input)?;
            return pass::train_pass(&hidden, self.head(), units, rows, gradients);
        }
        self.check(&input)?;
        let mut tape = Tape::new(self.setting(), input.segments, Keys::Batch, memory);
        let root = self
            .decoder
            .hidden(&mut tape, input.input_ids, input.positions)?;
        let hidden = tape.value(&root)?;
        let head = self.head_layer();
        let mut dhidden = self.arena.take(hidden.len())?;
        let reports = {
            let mut logits = self.chunk_of_logits(input.positions.len())?;
            let dweight = gradients.of(self.decoder.head())?;
            let weight = Values::of(self.decoder.head())?;
            let to = (&mut *dhidden, dweight);
            let hidden = (&hidden[..], units);
            head_loss::head_loss(head, hidden, &weight, &mut logits, rows, to)
        };
        drop(hidden);
        tape.backward(root, dhidden, gradients)?;
        Ok(reports)
    }

    /// Calls `row` with the index and the logits (V) of each position, in no order, and returns
    /// what it says, in order.
    ///
    /// # Errors
    /// As [`Model::train_pass`].
    pub fn map_logits<R: Send>(
        &self,
        input: Input,
        row: impl Fn(usize, &mut [f32]) -> R + Sync,
    ) -> Result<Vec<R>> {
        if self.frame == Frame::Composed {
            return pass::map_logits(&self.composed_hidden(input)?, self.head(), row);
        }
        self.check(&input)?;
        let mut tape = Tape::new(self.setting(), input.segments, Keys::Batch, Memory::Forget);
        let root = self
            .decoder
            .hidden(&mut tape, input.input_ids, input.positions)?;
        let hidden = tape.value(&root)?;
        let mut logits = self.chunk_of_logits(input.positions.len())?;
        let weight = Values::of(self.decoder.head())?;
        let head = self.head_layer();
        Ok(head_loss::map_logits(
            head,
            &hidden,
            &weight,
            &mut logits,
            row,
        ))
    }

    /// Hidden states (N x D), ready for the head, in candle's operations: differentiable by candle
    /// where the weights are variables.
    ///
    /// # Errors
    /// As [`Model::train_pass`].
    pub fn composed_hidden(&self, input: Input) -> Result<Tensor> {
        self.check(&input)?;
        let dtype = match self.precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        };
        let mut graph = Composed::new(
            self.config.heads,
            self.rope.as_ref(),
            input.segments,
            dtype,
            self.head().device(),
        )?;
        self.decoder
            .hidden(&mut graph, input.input_ids, input.positions)
    }

    fn chunk_of_logits(&self, positions: usize) -> Result<Buffer> {
        Ok(self
            .arena
            .take(positions.min(CHUNK) * self.config.vocab_size)?)
    }

    fn check(&self, input: &Input) -> Result<()> {
        let context = self.config.max_position_embeddings;
        let mut next = 0;
        for segment in input.segments {
            if segment.start != next || segment.len() > context {
                bail!("segment {segment:?} has no place: the model's context is {context}");
            }
            next = segment.end;
        }
        if next != input.input_ids.len() {
            bail!("segments cover {next} tokens of {}", input.input_ids.len());
        }
        Ok(())
    }
}

//! Passes over whole sequences: for training, and for evaluation.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};

use crate::model::candle_graph::{Composed, pass};
use crate::model::gradients::Gradients;
use crate::model::tape::{Keys, Memory, Tape};
use crate::model::{Frame, Input, Model};
use crate::ops::Values;
use crate::ops::arena::Buffer;
use crate::ops::head_loss;
use crate::ops::head_loss::{Rows, Units, chunk_rows};
use crate::ops::matmul::Precision;

impl Model {
    /// Gradients of the variables among the weights: none yet.
    pub fn gradients(&self) -> Gradients {
        Gradients::new(self.arena.clone())
    }

    /// One training pass: hands `rows` the logits of each unit of positions, which it turns into their
    /// gradient, adds the gradients of all variables to `gradients`, and returns what `rows` said, in
    /// order. No more than a chunk of logits exists at a time.
    ///
    /// `memory` is [`Memory::Record`] or [`Memory::Checkpoint`]; only the tape heeds it.
    ///
    /// # Errors
    /// Where an id is past the vocabulary, a segment longer than the model's context, or `rows` cannot
    /// get ready.
    pub fn train_pass<R: Rows>(
        &self,
        input: Input,
        units: &Units,
        memory: Memory,
        rows: &mut R,
        gradients: &mut Gradients,
    ) -> Result<Vec<R::Report>> {
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
            head_loss::head_loss(head, hidden, &weight, &mut logits, rows, to)?
        };
        drop(hidden);
        tape.backward(root, dhidden, gradients)?;
        Ok(reports)
    }

    /// A forward pass up to the head.
    ///
    /// # Errors
    /// Where an id is past the vocabulary or a segment longer than the model's context.
    pub fn hidden(&self, input: Input) -> Result<Hidden<'_>> {
        let states = if self.frame == Frame::Composed {
            States::Elsewhere(self.composed_hidden(input)?.detach())
        } else {
            self.check(&input)?;
            let mut tape = Tape::new(self.setting(), input.segments, Keys::Batch, Memory::Forget);
            let root = self
                .decoder
                .hidden(&mut tape, input.input_ids, input.positions)?;
            States::Here(tape.value(&root)?)
        };
        Ok(Hidden {
            model: self,
            states,
        })
    }

    /// Hands `rows` the logits of each position, a chunk at a time, and returns what it says, in order.
    ///
    /// # Errors
    /// As [`Model::train_pass`].
    pub fn map_rows<R: Rows>(&self, input: Input, rows: &mut R) -> Result<Vec<R::Report>> {
        let hidden = self.hidden(input)?;
        let (count, vocabulary) = (input.positions.len(), self.config.vocab_size);
        let mut logits = self.chunk_of_logits(count)?;
        let mut reports = Vec::with_capacity(count);
        let chunk = chunk_rows(vocabulary);
        for start in (0..count).step_by(chunk) {
            let range = start..count.min(start + chunk);
            rows.begin(range.clone())?;
            let logits = &mut logits[..range.len() * vocabulary];
            hidden.logits(range.clone(), logits)?;
            let units = Units::new(range.len(), &[]);
            reports.extend(units.map(start, logits, vocabulary, rows));
        }
        Ok(reports)
    }

    /// [`Model::map_rows`] with the index and the logits (V) of each position.
    ///
    /// # Errors
    /// As [`Model::train_pass`].
    pub fn map_logits<R: Send>(
        &self,
        input: Input,
        row: impl Fn(usize, &mut [f32]) -> R + Sync,
    ) -> Result<Vec<R>> {
        let mut rows = |at: Range<usize>, logits: &mut [f32]| vec![row(at.start, logits)];
        self.map_rows(input, &mut rows)
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
        let vocabulary = self.config.vocab_size;
        let rows = positions.min(chunk_rows(vocabulary));
        Ok(self.arena.take(rows * vocabulary)?)
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

/// Hidden states (N x D) of a forward pass, ready for the head.
pub struct Hidden<'a> {
    model: &'a Model,
    states: States,
}

enum States {
    /// Of the tape.
    Here(Arc<Buffer>),
    /// Of candle's operations.
    Elsewhere(Tensor),
}

impl Hidden<'_> {
    /// Writes the logits (n x V) of the n positions in `range`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn logits(&self, range: Range<usize>, to: &mut [f32]) -> candle_core::Result<()> {
        let head = self.model.head_layer();
        match &self.states {
            States::Here(hidden) => {
                let hidden = &hidden[range.start * head.inputs..range.end * head.inputs];
                let weight = Values::of(self.model.head())?;
                head.forward(hidden, &weight, None, to, false);
            }
            States::Elsewhere(hidden) => {
                let hidden = hidden.narrow(0, range.start, range.len())?;
                let weight = self.model.head().detach().to_dtype(hidden.dtype())?.t()?;
                let logits = hidden.matmul(&weight)?.to_dtype(DType::F32)?;
                let logits = logits.to_device(&Device::Cpu)?.flatten_all()?;
                to.copy_from_slice(&Values::of(&logits)?);
            }
        }
        Ok(())
    }
}

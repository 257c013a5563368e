//! Forward and backward passes over whole sequences, for training and evaluation.

#![allow(
    non_snake_case,
    reason = "tensor names end in their shape: see the legend in `model`"
)]

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use candle_core::{DType, Device, Tensor};

use crate::model::candle_graph::{CandleGraph, head};
use crate::model::gradients::Gradients;
use crate::model::graph::Segments;
use crate::model::tape::{Activations, KeyValueSource, Tape};
use crate::model::{Backend, Model, ModelInput, SourceInput};
use crate::ops::CpuValues;
use crate::ops::arena::Buffer;
use crate::ops::head_loss::{HeadGradients, LogitsVisitor, PositionGroups, chunk_rows, head_loss};
use crate::ops::matmul::Precision;

impl Model {
    /// Creates an empty set of gradients in the model's arena.
    pub fn gradients(&self) -> Gradients {
        Gradients::new(self.arena.clone())
    }

    /// Runs one forward and backward pass. `visitor` turns the logits of each group of positions into
    /// their gradient; the gradients of all variables are added to `gradients`. Returns the results of
    /// `visitor`, in order. At most one chunk of logits exists at a time.
    ///
    /// `activations` is [`Activations::Keep`] or [`Activations::Recompute`];
    /// [`Backend::Candle`] ignores it.
    ///
    /// # Errors
    /// Where an id is outside the vocabulary, a segment is longer than the model's context, or
    /// `visitor` fails to prepare.
    pub fn forward_backward<R: LogitsVisitor>(
        &self,
        input: ModelInput,
        groups: &PositionGroups,
        activations: Activations,
        visitor: &mut R,
        gradients: &mut Gradients,
    ) -> Result<Vec<R::Output>> {
        if self.backend == Backend::Candle {
            let hidden_ND = self.candle_hidden(input)?;
            return head::forward_backward(&hidden_ND, self.head(), groups, visitor, gradients);
        }
        self.check_segments(&input)?;
        let mut tape = Tape::new(
            self.tape_settings(),
            input.segments(),
            KeyValueSource::Batch,
            activations,
        );
        let root = self.network.hidden(&mut tape, input)?;
        let hidden_ND = tape.value(&root)?;
        let head = self.head_layer();
        let mut dhidden_ND = self.arena.take(hidden_ND.len())?;
        let outputs = {
            let mut logits_chunk = self.logits_chunk(input.positions_N.len())?;
            let dweight_VD = gradients.accumulator(self.network.head())?;
            let weight_VD = CpuValues::new(self.network.head())?;
            head_loss(
                head,
                &hidden_ND,
                groups,
                &weight_VD,
                &mut logits_chunk,
                visitor,
                HeadGradients {
                    dhidden_ND: &mut dhidden_ND,
                    dweight_VD,
                },
            )?
        };
        drop(hidden_ND);
        tape.backward(root, dhidden_ND, gradients)?;
        Ok(outputs)
    }

    /// Runs a forward pass up to the LM head.
    ///
    /// # Errors
    /// Where an id is outside the vocabulary or a segment is longer than the model's context.
    pub fn hidden(&self, input: ModelInput) -> Result<HiddenStates<'_>> {
        let data = if self.backend == Backend::Candle {
            HiddenData::Candle(self.candle_hidden(input)?.detach())
        } else {
            self.check_segments(&input)?;
            let mut tape = Tape::new(
                self.tape_settings(),
                input.segments(),
                KeyValueSource::Batch,
                Activations::Discard,
            );
            let root = self.network.hidden(&mut tape, input)?;
            HiddenData::Tape(tape.value(&root)?)
        };
        Ok(HiddenStates { model: self, data })
    }

    /// Computes the logits of all positions, a chunk at a time, and calls `visitor` with the logits of each
    /// position. Returns the results of `visitor`, in order.
    ///
    /// # Errors
    /// As [`Model::forward_backward`].
    pub fn visit_logits<R: LogitsVisitor>(
        &self,
        input: ModelInput,
        visitor: &mut R,
    ) -> Result<Vec<R::Output>> {
        let hidden = self.hidden(input)?;
        let count = input.positions_N.len();
        let vocabulary = self.config.vocab_size;
        let mut logits_chunk = self.logits_chunk(count)?;
        let mut outputs = Vec::with_capacity(count);
        let rows = chunk_rows(vocabulary);
        for start in (0..count).step_by(rows) {
            let range = start..count.min(start + rows);
            visitor.prepare(range.clone())?;
            let logits_nV = &mut logits_chunk[..range.len() * vocabulary];
            hidden.logits(range.clone(), logits_nV)?;
            let groups = PositionGroups::new(range.len(), &[]);
            outputs.extend(groups.visit(start, logits_nV, vocabulary, visitor));
        }
        Ok(outputs)
    }

    /// Calls `visit` with the index and the logits (V) of each position. Returns the results, in order.
    ///
    /// # Errors
    /// As [`Model::forward_backward`].
    pub fn map_logits<R: Send>(
        &self,
        input: ModelInput,
        visit: impl Fn(usize, &mut [f32]) -> R + Sync,
    ) -> Result<Vec<R>> {
        let mut visitor =
            |range: Range<usize>, logits_V: &mut [f32]| vec![visit(range.start, logits_V)];
        self.visit_logits(input, &mut visitor)
    }

    /// Computes hidden states (N x D), ready for the LM head, with candle. If weights are variables, candle
    /// can differentiate the result.
    ///
    /// # Errors
    /// As [`Model::forward_backward`].
    pub fn candle_hidden(&self, input: ModelInput) -> Result<Tensor> {
        self.check_segments(&input)?;
        let dtype = match self.precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        };
        let mut graph = CandleGraph::new(
            self.config.heads,
            self.rope.as_ref(),
            input.segments(),
            dtype,
            self.head().device(),
        )?;
        self.network.hidden(&mut graph, input)
    }

    /// Allocates the logits of one chunk of `positions`.
    fn logits_chunk(&self, positions: usize) -> Result<Buffer> {
        let vocabulary = self.config.vocab_size;
        let rows = positions.min(chunk_rows(vocabulary));
        Ok(self.arena.take(rows * vocabulary)?)
    }

    /// Checks that the segments cover all tokens in order and fit the model's context, and that an encoder-decoder has
    /// one source per segment.
    fn check_segments(&self, input: &ModelInput) -> Result<()> {
        let context = self.config.max_position_embeddings;
        check_covered(input.segments_B, input.input_ids_T.len(), context)?;
        let SourceInput { ids_U, segments_B } = input.source;
        check_covered(segments_B, ids_U.len(), context)?;
        let expected = if self.config.is_encoder_decoder() {
            input.segments_B.len()
        } else {
            0
        };
        ensure!(
            segments_B.len() == expected && segments_B.iter().all(|source| !source.is_empty()),
            "internal error: {} sources for {} sequences of a {} model",
            segments_B.len(),
            input.segments_B.len(),
            self.config.model_type()
        );
        Ok(())
    }
}

/// Checks that `segments` cover `tokens` tokens in order and have at most `context` tokens each.
fn check_covered(segments: &[Range<usize>], tokens: usize, context: usize) -> Result<()> {
    let mut covered = 0;
    for segment in segments {
        if segment.start != covered || segment.len() > context {
            bail!(
                "segment {segment:?} must begin at {covered} and fit the model's context of {context} tokens"
            );
        }
        covered = segment.end;
    }
    ensure!(
        covered == tokens,
        "segments cover {covered} of {tokens} tokens"
    );
    Ok(())
}

impl<'a> ModelInput<'a> {
    fn segments(&self) -> Segments<'a> {
        Segments {
            decoder: self.segments_B,
            source: self.source.segments_B,
        }
    }
}

/// Hidden states (N x D) of a forward pass, ready for the LM head.
pub struct HiddenStates<'a> {
    model: &'a Model,
    data: HiddenData,
}

enum HiddenData {
    /// Computed by the tape.
    Tape(Arc<Buffer>),
    /// Computed by candle, on the model's device.
    Candle(Tensor),
}

impl HiddenStates<'_> {
    /// Writes the logits of the n positions in `range` to `logits_nV`.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn logits(&self, range: Range<usize>, logits_nV: &mut [f32]) -> candle_core::Result<()> {
        let head = self.model.head_layer();
        match &self.data {
            HiddenData::Tape(hidden_ND) => {
                let hidden_nD = &hidden_ND[range.start * head.inputs..range.end * head.inputs];
                let weight_VD = CpuValues::new(self.model.head())?;
                head.forward(hidden_nD, &weight_VD, None, logits_nV, false);
            }
            HiddenData::Candle(hidden_ND) => {
                let hidden_nD = hidden_ND.narrow(0, range.start, range.len())?;
                let weight_VD = self.model.head().detach().to_dtype(hidden_nD.dtype())?;
                let device_logits_nV = hidden_nD.matmul(&weight_VD.t()?)?.to_dtype(DType::F32)?;
                let cpu_logits_nV = device_logits_nV.to_device(&Device::Cpu)?.flatten_all()?;
                logits_nV.copy_from_slice(&CpuValues::new(&cpu_logits_nV)?);
            }
        }
        Ok(())
    }
}

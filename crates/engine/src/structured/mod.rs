//! Structured outputs: sequences whose text must match a JSON schema, a regular expression, one of
//! several choices or a grammar.
//!
//! ```text
//! caller: StructuredOutputs ──▶ Compiler ──▶ Grammar       once a request, on the caller's thread
//! engine: plan ──▶ Constraints::fill ──▶ plan with masks   before a step is launched
//! engine: tokens ──▶ Constraints::advance                  once they are known
//! ```
//!
//! The work on grammars is llguidance's: a lexer of derivatives of regular expressions under an
//! Earley parser, matched against the vocabulary as a trie of bytes. A sequence that is constrained
//! takes part in no step before its last token is known
//! ([`Request::lockstep`](batch_scheduler::Request::lockstep)): what may come next depends on it. With
//! several steps in flight its mask is computed while the model works on the others' step, and its
//! tokens come at every second step; requests without a constraint pay nothing.

mod compile;
mod constraints;
mod terminals;
mod vocabulary;
mod workbench;

use serde_json::Value;

pub(crate) use compile::{Compiler, Grammar};
pub(crate) use constraints::Constraints;

/// Most bytes of a schema or a list of choices.
pub const MAX_CONSTRAINT_BYTES: usize = 256 << 10;

/// Most bytes of a grammar.
pub const MAX_GRAMMAR_BYTES: usize = 64 << 10;

/// Most bytes of a regular expression, or of a text in a schema.
pub const MAX_REGEX_BYTES: usize = 16 << 10;

/// Most levels of a JSON schema, as in vLLM.
pub const MAX_SCHEMA_DEPTH: usize = 64;

/// What the text of a request must look like. vLLM's `structured_outputs`.
#[derive(Clone, Debug, PartialEq)]
pub struct StructuredOutputs {
    /// The text as a whole.
    pub constraint: Constraint,
    /// JSON without white space between its parts; else a space may come there, or a new line with up
    /// to 20 characters of indentation.
    pub disable_any_whitespace: bool,
    /// What may stand between the parts of JSON, as a regular expression.
    pub whitespace_pattern: Option<String>,
    /// Objects of a schema that does not say otherwise have no properties but those it names.
    pub disable_additional_properties: bool,
    /// Free text comes first, and ends with this (`</think>`, of a model that reasons): what
    /// follows it is constrained. Where the prompt ends with it, there is no free text.
    pub after: Option<String>,
    /// The request's field, for errors.
    pub param: &'static str,
}

/// A kind of constraint.
#[derive(Clone, Debug, PartialEq)]
pub enum Constraint {
    /// JSON that a schema describes.
    Json(Value),
    /// Any JSON object.
    JsonObject,
    /// Text that matches a regular expression from beginning to end. Its syntax is that of the crate
    /// `regex` without anchors inside; `\d`, `\w` and `\s` are ASCII.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of a context-free grammar in (llguidance's dialect of) Lark's notation.
    Grammar(String),
}

impl StructuredOutputs {
    /// A constraint with everything else at its default.
    pub fn new(constraint: Constraint) -> Self {
        StructuredOutputs {
            constraint,
            disable_any_whitespace: false,
            whitespace_pattern: None,
            disable_additional_properties: false,
            after: None,
            param: "structured_outputs",
        }
    }
}

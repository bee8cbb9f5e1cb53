//! The boundary to the model.

use crate::plan::{StepOutput, StepPlan};

/// Runs steps of a model. Plans are launched in order and collected in the same order; between
/// the two the caller may schedule and launch the next one (overlap, pipeline stages).
///
/// A sample row of a sequence whose last token is still in flight is legal: the runner knows that
/// token (it sampled it) even if the scheduler does not yet.
pub trait ModelRunner {
    /// Sampling parameters, one a sequence.
    type Params;
    /// What sampling reports beside the token (log-probabilities).
    type Extra;
    /// A launched step. Not `Clone`: it is collected once.
    type Ticket;
    /// A failure that ends the engine (the device is lost, a rank died), unless
    /// [`is_out_of_memory`](Self::is_out_of_memory) says otherwise.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Starts a step.
    fn launch(&mut self, plan: StepPlan<Self::Params>) -> Result<Self::Ticket, Self::Error>;

    /// Whether an error of [`launch`](Self::launch) means that memory ran out for the step's rows
    /// and that the runner can go on. It has then carried out everything that stands in front of
    /// the rows in the plan, has kept nothing of the rows, and is ready for the next plan. The
    /// caller takes the step back: [`Scheduler::abandon`](crate::Scheduler::abandon).
    fn is_out_of_memory(&self, _error: &Self::Error) -> bool {
        false
    }

    /// Waits for a step and returns what it sampled.
    fn collect(&mut self, ticket: Self::Ticket) -> Result<StepOutput<Self::Extra>, Self::Error>;
}

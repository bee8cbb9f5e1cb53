//! Figures by API key. vLLM has none, so their prefix is another.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::buckets::FIRST_TOKEN;
use crate::serve::auth::Tenant;

/// What one tenant has had.
pub(super) struct TenantMetrics {
    pub(super) requests: Counter,
    pub(super) rejections: Counter,
    pub(super) prompt_tokens: Counter,
    pub(super) generation_tokens: Counter,
    pub(super) queue_time: Histogram,
}

type KeyLabel = [(&'static str, String); 1];

/// Series labelled with the tenants' names, in the order of `tenants`.
pub(super) fn tenant_metrics(registry: &mut Registry, tenants: &[Tenant]) -> Vec<TenantMetrics> {
    if tenants.is_empty() {
        return Vec::new();
    }
    let mut counter = |name: &str, help: &str| {
        let family = Family::<KeyLabel, Counter>::default();
        registry.register(name, help, family.clone());
        family
    };
    let requests = counter("nano_vllm:key_requests", "Prompts that were taken, by key");
    let rejections = counter(
        "nano_vllm:key_admission_rejections",
        "Requests that were not taken, by key",
    );
    let prompt_tokens = counter("nano_vllm:key_prompt_tokens", "Prompt tokens, by key");
    let generation_tokens = counter(
        "nano_vllm:key_generation_tokens",
        "Tokens generated, by key",
    );
    let new_histogram: fn() -> Histogram = || Histogram::new(FIRST_TOKEN);
    let queue_time =
        Family::<KeyLabel, Histogram, fn() -> Histogram>::new_with_constructor(new_histogram);
    registry.register(
        "nano_vllm:key_queue_time_seconds",
        "From arrival to the first step, by key",
        queue_time.clone(),
    );
    let one = |tenant: &Tenant| {
        let label = [("api_key", tenant.name.clone())];
        TenantMetrics {
            requests: requests.get_or_create_owned(&label),
            rejections: rejections.get_or_create_owned(&label),
            prompt_tokens: prompt_tokens.get_or_create_owned(&label),
            generation_tokens: generation_tokens.get_or_create_owned(&label),
            queue_time: queue_time.get_or_create_owned(&label),
        }
    };
    tenants.iter().map(one).collect()
}

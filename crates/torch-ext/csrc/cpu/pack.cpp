// Row-major checkpoint rows into packed panels.
#include "api.h"
#include "kernels.h"
#include "transpose.h"

namespace {

template <class Src, class Dst>
void pack(const TePack& p) {
    size_t first = p.row / PANEL, last = (p.row + p.rows + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (size_t i = first; i < last; ++i) {
            char* panel = (char*)p.panels + i * panel_bytes<Dst>(p.k);
            const void* rows[PANEL];
            size_t found = 0;
            for (size_t j = 0; j < PANEL; ++j) {
                size_t row = i * PANEL + j;
                bool inside = row >= p.row && row < p.row + p.rows;
                const char* src = (const char*)p.src;
                rows[j] = inside ? src + (row - p.row) * p.src_stride * Src::SIZE : nullptr;
                found += inside;
            }
            if (found == PANEL) {
                fill_panel<Src, Dst, true>(rows, p.k, panel);
                continue;
            }
            // The other columns belong to a neighbour, or are padding: leave them.
            for (size_t j = 0; j < PANEL; ++j)
                for (size_t k = 0; rows[j] && k < p.k; ++k)
                    panel_put<Dst>(panel, k, j, Src::get(rows[j], k));
        }
#if defined(__x86_64__)
        _mm_sfence();  // streaming stores are visible before the team joins
#endif
    }
}

}  // namespace

void TE(pack)(const TePack* p) {
    with_dtype(p->src_dtype, [&](auto s) {
        with_dtype(p->dtype, [&](auto d) { pack<decltype(s), decltype(d)>(*p); });
    });
}

"""Answers questions over HTTP while model, factors and index stay open.

    HTTP threads of worker 0                         main thread of every worker
    app ─ requests ─> desk (jobs wait) ── command ──> loop ── session: rank, exact
    app <─ events ─── answering <───────────────────┘

All computing is in the workers' main threads, in step; worker 0's other threads speak HTTP.
"""

"""HShare (ICLR 2025): lists of critical tokens that layers, heads and steps share by a plan.

In the order of the algorithm: `settings`, `channels`, `critical_tokens`, `pools`, `similarity`, `share_plan`,
`tail_fit`, `shared_lists`, `method`; `plan_files` keeps plans and channels on disk.
"""

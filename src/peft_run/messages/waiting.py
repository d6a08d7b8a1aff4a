"""How far a stage is."""

TABLE = {
    "waiting.done": {"en": "{done} of {total}, {left} left", "zh": "已完成 {done}/{total}，剩余 {left}"},
}

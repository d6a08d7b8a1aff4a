"""What a sweep over hyperparameters says."""

TABLE = {
    "sweep.none": {
        "en": "{path} is no sweep: it has no sweep.yaml and recipe.yaml, and no folder `sweep-...` with them.",
        "zh": "{path} 不是一次搜索：其中没有 sweep.yaml 和 recipe.yaml，也没有含有它们的 `sweep-...` 文件夹。",
    },
    "sweep.no_recipe": {
        "en": "give a recipe and axes, `peft sweep recipe.yaml --axis adapter.r=4,8,16`; or a sweep to go on with, "
        "`peft sweep --resume DIR`.",
        "zh": "请给出配方与搜索轴：`peft sweep recipe.yaml --axis adapter.r=4,8,16`；或要继续的搜索：`peft sweep --resume DIR`。",
    },
    "sweep.fixed_on_resume": {
        "en": "a resumed sweep keeps its settings; {changes} cannot be changed. Start a new sweep.",
        "zh": "继续的搜索沿用原设置，不能更改 {changes}。请开始新的搜索。",
    },
    "sweep.invalid": {"en": "{file}: {problem}", "zh": "{file}：{problem}"},
    "sweep.no_axes": {
        "en": "{file}: `axes` must be a mapping from fields of the recipe to lists or ranges.",
        "zh": "{file}：`axes` 必须把配方字段映射到列表或范围。",
    },
    "sweep.bad_axis": {
        "en": "`{text}` is no axis; write --axis adapter.r=4,8,16 or --axis 'train.lr={{low: 1e-4, high: 1e-2, log: true}}'.",
        "zh": "`{text}` 不是搜索轴；请写作 --axis adapter.r=4,8,16 或 --axis 'train.lr={{low: 1e-4, high: 1e-2, log: true}}'。",
    },
    "sweep.axis_twice": {"en": "the axis {axis} is given twice.", "zh": "搜索轴 {axis} 给出了两次。"},
    "sweep.value_twice": {"en": "the axis {axis} has the same value twice.", "zh": "搜索轴 {axis} 中有重复的值。"},
    "sweep.no_number": {
        "en": "the axis {axis} is no number; give its values as a list.",
        "zh": "搜索轴 {axis} 不是数值；请用列表给出取值。",
    },
    "sweep.fixed": {
        "en": "{axis} cannot be an axis: trials that differ in it cannot be ranked ({fixed}). Change it for all of "
        "them, with {axis}=VALUE.",
        "zh": "{axis} 不能作为搜索轴：在该项上不同的试验无法排名（{fixed}）。请用 {axis}=值 统一修改。",
    },
    "sweep.endless": {
        "en": "a grid needs steps: give the axis {axis} a `step` or a list, or take --search random.",
        "zh": "网格搜索需要步长：请给搜索轴 {axis} 加上 `step` 或改用列表，或使用 --search random。",
    },
    "sweep.part_of_grid": {
        "en": "the grid has {size} points, and a part of it would leave out whole values; for {trials} trials take "
        "--search random.",
        "zh": "网格共有 {size} 个点，只跑一部分会漏掉整个取值；若只做 {trials} 次试验，请用 --search random。",
    },
    "sweep.no_objective": {
        "en": "there is no measure {name}; did you mean {nearest}?",
        "zh": "没有指标 {name}；是不是 {nearest}？",
    },
    "sweep.no_held_out": {
        "en": "a sweep needs held-out data to rank its trials: set data.eval.",
        "zh": "搜索需要留出数据来给试验排名：请设置 data.eval。",
    },
    "sweep.no_storage": {
        "en": "the study in {storage} cannot be opened: {problem}",
        "zh": "无法打开 {storage} 中的研究：{problem}",
    },
    "sweep.no_value": {
        "en": "the objective {objective} came out as no number.",
        "zh": "目标 {objective} 的结果不是数值。",
    },
    "sweep.out_of_memory": {"en": "out of memory: {problem}", "zh": "内存不足：{problem}"},
    "sweep.killed": {
        "en": "the system killed the process (SIGKILL), most often because memory ran out",
        "zh": "进程被系统终止（SIGKILL），多半是内存耗尽",
    },
    "sweep.signal": {"en": "the process died of {name}", "zh": "进程因 {name} 而终止"},
    "sweep.died": {"en": "the process ended with code {code}: {last}", "zh": "进程以代码 {code} 结束：{last}"},
    "sweep.begin": {
        "en": "Sweep: {left} of {total} trials to go, in {path}; Ctrl-C stops and saves",
        "zh": "搜索：共 {total} 次试验，还剩 {left} 次，目录 {path}；按 Ctrl-C 可停止并保存",
    },
    "sweep.trial": {"en": "Trial {number} (of {total}): {point}", "zh": "试验 {number}（共 {total} 次）：{point}"},
    "sweep.evaluated": {
        "en": "  step {step}/{total}: held-out loss {loss:.4f}",
        "zh": "  第 {step}/{total} 步：留出集损失 {loss:.4f}",
    },
    "sweep.ended": {
        "en": "  {objective} {value:.4f}, trained for {seconds:.0f} s; about {left} left",
        "zh": "  {objective} {value:.4f}，训练 {seconds:.0f} 秒；大约还需 {left}",
    },
    "sweep.pruned": {
        "en": "  stopped early: worse than the median so far; about {left} left",
        "zh": "  提前停止：差于目前的中位数；大约还需 {left}",
    },
    "sweep.failed": {"en": "the trial failed: {reason}", "zh": "试验失败：{reason}"},
    "sweep.all_failed": {
        "en": "all {count} trials failed; the first: {reason} (more in {path})",
        "zh": "全部 {count} 次试验都失败了；第一个：{reason}（详见 {path}）",
    },
    "sweep.interrupted": {
        "en": "stopped, and saved; `peft sweep --resume {path}` goes on from there.",
        "zh": "已停止并保存；运行 `peft sweep --resume {path}` 可从此处继续。",
    },
}

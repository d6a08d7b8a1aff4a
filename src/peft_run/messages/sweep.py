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
    "sweep.title": {"en": "Sweep: {name}", "zh": "超参数搜索：{name}"},
    "sweep.objective_min": {"en": "{name} (lower is better)", "zh": "{name}（越低越好）"},
    "sweep.objective_max": {"en": "{name} (higher is better)", "zh": "{name}（越高越好）"},
    "sweep.summary": {
        "en": "{done} trials finished, {pruned} stopped early, {failed} failed. Search: {search}, seed {seed}. "
        "Objective: {objective}, on held-out data.",
        "zh": "完成 {done} 次试验，提前停止 {pruned} 次，失败 {failed} 次。搜索方式：{search}，种子 {seed}。目标：留出数据上的 {objective}。",
    },
    "sweep.best": {
        "en": "Best: trial {number}, {point}, with {value}.",
        "zh": "最好：试验 {number}，{point}，结果 {value}。",
    },
    "sweep.flattered": {
        "en": "The best of many is flattered by chance, because the held-out data chose it. What it is worth shows on "
        "data that took no part: retrain it and judge it on test data.",
        "zh": "众多试验中的最好者带有运气成分，因为它正是由留出数据选出的。其真实水平要看未参与选择的数据：请重新训练，并在测试数据上评测。",
    },
    "sweep.seed_spread": {
        "en": "Trials that differ in their seed alone have a standard deviation of {value}.",
        "zh": "仅种子不同的试验之间，标准差为 {value}。",
    },
    "sweep.ranking": {"en": "Ranking", "zh": "排名"},
    "sweep.how_ranked": {
        "en": "In brackets the 95 % interval over the held-out samples. p: how often chance alone makes a trial differ "
        "so much from the first, on the same samples; it allows neither for seeds nor for the number of trials. "
        "Memory: the peak of the process, or of the GPU, while training. ✓: no other trial is at least as good in "
        "quality, memory and size, and better in one.",
        "zh": "方括号内是留出样本上的 95% 区间。p：在相同样本上，仅凭偶然就与第一名相差这么多的频率；未考虑种子，也未考虑试验次数。"
        "内存：训练时进程（或 GPU）的峰值。✓：没有其他试验在质量、内存、大小上都不差且有一项更好。",
    },
    "sweep.number": {"en": "trial", "zh": "试验"},
    "sweep.values": {"en": "values", "zh": "取值"},
    "sweep.state": {"en": "state", "zh": "状态"},
    "sweep.reason": {"en": "reason", "zh": "原因"},
    "sweep.p": {"en": "p against the first", "zh": "与第一名相比的 p"},
    "sweep.memory": {"en": "peak memory (MB)", "zh": "内存峰值（MB）"},
    "sweep.size": {"en": "adapter (MB)", "zh": "适配器（MB）"},
    "sweep.seconds": {"en": "training (s)", "zh": "训练（秒）"},
    "sweep.front": {"en": "Pareto", "zh": "帕累托"},
    "sweep.heat": {"en": "Two axes together", "zh": "两个轴的组合"},
    "sweep.heat_title": {"en": "{objective}, mean of the trials", "zh": "{objective}，试验均值"},
    "sweep.figure_heat": {
        "en": "Over the two axes that move the mean most; darker is better.",
        "zh": "取对均值影响最大的两个轴；颜色越深越好。",
    },
    "sweep.pareto": {"en": "Quality, memory and size", "zh": "质量、内存与大小"},
    "sweep.figure_pareto": {
        "en": "Red: trials that no other beats in quality, memory and size together.",
        "zh": "红色：在质量、内存、大小上不被任何其他试验全面超过的试验。",
    },
    "sweep.curve": {"en": "Learning curve over data size", "zh": "数据量的学习曲线"},
    "sweep.figure_curve": {
        "en": "By the share of the training data; a larger share contains the smaller ones.",
        "zh": "横轴为训练数据的比例；较大的比例包含较小的。",
    },
    "sweep.effect_charts": {"en": "One axis at a time", "zh": "逐轴查看"},
    "sweep.figure_effect": {
        "en": "Each dot is a trial; the line joins the means.",
        "zh": "每个点是一次试验；折线连接均值。",
    },
    "sweep.effects": {"en": "Effect of each axis", "zh": "各轴的影响"},
    "sweep.how_effects": {
        "en": "Means over all trials at a value, whatever the other axes did, with the 95 % interval over trials.",
        "zh": "取某个值的全部试验的均值（其他轴任意），附试验间的 95% 区间。",
    },
    "sweep.axis": {"en": "axis", "zh": "轴"},
    "sweep.value": {"en": "value", "zh": "取值"},
    "sweep.trials": {"en": "trials", "zh": "试验数"},
    "sweep.mean": {"en": "mean", "zh": "均值"},
    "sweep.interval": {"en": "interval", "zh": "区间"},
    "sweep.each": {"en": "each trial", "zh": "每次试验"},
    "sweep.best_line": {"en": "best", "zh": "最好"},
    "sweep.all_trials": {"en": "all trials", "zh": "全部试验"},
    "sweep.on_front": {"en": "Pareto front", "zh": "帕累托前沿"},
    "sweep.axis_peak_memory_mb": {"en": "peak memory (MB)", "zh": "内存峰值（MB）"},
    "sweep.axis_file_mb": {"en": "adapter (MB)", "zh": "适配器（MB）"},
    "sweep.not_finished": {"en": "Trials without a result", "zh": "没有结果的试验"},
    "sweep.state_started": {"en": "unfinished", "zh": "未完成"},
    "sweep.state_pruned": {"en": "stopped early", "zh": "提前停止"},
    "sweep.state_failed": {"en": "failed", "zh": "失败"},
    "sweep.file": {"en": "The file {name}", "zh": "文件 {name}"},
    "sweep.report": {"en": "Report: {path}", "zh": "报告：{path}"},
    "sweep.wrote_best": {
        "en": "Wrote the recipe of trial {number} to {path}; `peft train {path}` trains it again.",
        "zh": "已将试验 {number} 的配方写入 {path}；运行 `peft train {path}` 可重新训练。",
    },
    "sweep.no_best": {"en": "no trial of {path} has finished yet.", "zh": "{path} 中还没有完成的试验。"},
    "sweep.which": {
        "en": "give one sweep: `peft sweep {action} DIR`.",
        "zh": "请给出一个搜索目录：`peft sweep {action} DIR`。",
    },
    "sweep.there_already": {
        "en": "{path} is there already; choose another name.",
        "zh": "{path} 已存在；请换一个名字。",
    },
}

"""What `peft demo` says."""

TABLE: dict[str, dict[str, str]] = {
    "demo.task": {
        "en": "Teach SmolLM2-135M, an English model, to tell good Chinese reviews from bad ones, with LoRA.",
        "zh": "用 LoRA 教会英文模型 SmolLM2-135M 判断中文评论的好坏。",
    },
    "demo.model": {
        "en": "Base model: {path} (converted from GGUF on first use)",
        "zh": "基座模型：{path}（首次使用时由 GGUF 转换）",
    },
    "demo.data": {
        "en": "Data: {train} reviews to train on, {held_out} held out; half are positive, none is in both parts",
        "zh": "数据：训练 {train} 条，留出 {held_out} 条；正负各半，两部分互不重复",
    },
    "demo.bf16": {
        "en": "Number format: bfloat16, which this CPU multiplies {speedup:.1f} times as fast as float32",
        "zh": "数值格式：bfloat16，本机乘法速度是 float32 的 {speedup:.1f} 倍",
    },
    "demo.fp32": {
        "en": "Number format: float32; bfloat16 products are only {speedup:.1f} times as fast on this CPU",
        "zh": "数值格式：float32；bfloat16 乘法在本机只有其 {speedup:.1f} 倍速度",
    },
    "demo.before": {
        "en": "Before training: held-out loss {loss:.3f}, accuracy {accuracy:.1%}",
        "zh": "训练前：留出集损失 {loss:.3f}，准确率 {accuracy:.1%}",
    },
    "demo.training": {
        "en": "Training {trainable:,} of {total:,} parameters ({share:.2%}) for {steps} steps; Ctrl-C stops and saves",
        "zh": "训练 {total:,} 个参数中的 {trainable:,} 个（{share:.2%}），共 {steps} 步；按 Ctrl-C 可停止并保存",
    },
    "demo.interrupted": {
        "en": "Stopped after step {step}. The adapter as it was then is in {output}",
        "zh": "在第 {step} 步后停止。当时的适配器已保存到 {output}",
    },
    "demo.after": {
        "en": "After training:  held-out loss {loss:.3f}, accuracy {accuracy:.1%}",
        "zh": "训练后：留出集损失 {loss:.3f}，准确率 {accuracy:.1%}",
    },
    "demo.replies": {
        "en": "Three held-out reviews, answered without and with the adapter:",
        "zh": "三条留出的评论，不用与使用适配器的回答：",
    },
    "demo.reply": {
        "en": "  review  {review}  (truth: {truth})\n    base    {base}\n    tuned   {tuned}",
        "zh": "  评论  {review}（标注：{truth}）\n    基座  {base}\n    微调  {tuned}",
    },
    "demo.saved": {
        "en": "Saved to {output}: {megabytes:.1f} MB",
        "zh": "已保存到 {output}：{megabytes:.1f} MB",
    },
    "demo.proof": {
        "en": "Largest difference between logits, in float32 (allowed: {tolerance}; the adapter itself moves them by "
        "{adapter_effect:.3g}):\n"
        "  reloaded from disk - trained    {reloaded:.2e}\n  merged into the base - trained  {merged:.2e}",
        "zh": "logits 的最大差异，float32（允许 {tolerance}；适配器本身带来的变化为 {adapter_effect:.3g}）：\n"
        "  从磁盘重新加载 - 训练所得  {reloaded:.2e}\n  合并进基座 - 训练所得  {merged:.2e}",
    },
    "demo.proof_failed": {
        "en": "the reloaded or the merged model differs from the trained one: logits by {reloaded:.2e} and {merged:.2e}"
        " (allowed: {tolerance})",
        "zh": "重新加载或合并后的模型与训练所得不一致：logits 相差 {reloaded:.2e} 与 {merged:.2e}，允许 {tolerance}",
    },
    "demo.took": {"en": "Done in {time}.", "zh": "完成，用时 {time}。"},
    "demo.next": {
        "en": """\
What to type next
  use the adapter, in Python:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from peft import PeftModel
    tokenizer = AutoTokenizer.from_pretrained("{model}")
    model = AutoModelForCausalLM.from_pretrained("{model}")
    model = PeftModel.from_pretrained(model, "{output}")
    prompt = tokenizer({prompt!r}, return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=8)[0]))
  train longer, or with a larger adapter:
    peft demo --steps {more_steps} --output runs/longer
    peft demo --rank {more_rank} --output runs/larger""",
        "zh": """\
接下来可以输入
  在 Python 中使用适配器：
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from peft import PeftModel
    tokenizer = AutoTokenizer.from_pretrained("{model}")
    model = AutoModelForCausalLM.from_pretrained("{model}")
    model = PeftModel.from_pretrained(model, "{output}")
    prompt = tokenizer({prompt!r}, return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=8)[0]))
  训练更久，或用更大的适配器：
    peft demo --steps {more_steps} --output runs/longer
    peft demo --rank {more_rank} --output runs/larger""",
    },
}

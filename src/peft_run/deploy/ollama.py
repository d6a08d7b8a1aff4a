"""An Ollama Modelfile: the chat template in Ollama's own language, found by asking ours what it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_run.errors import UsageError

if TYPE_CHECKING:
    from peft_run.artefact import Tuned
    from peft_run.data.render import Renderer

FIRST, SECOND = "\x00first\x00", "\x00second\x00"  # contents that stand in no template


def modelfile(tuned: Tuned, file_name: str) -> str:
    """FROM, TEMPLATE, the stop words, and the system prompt of the training data."""
    lines = [f"FROM ./{file_name}", f'TEMPLATE """{template(tuned.renderer)}"""']
    stops = [tuned.tokenizer.convert_ids_to_tokens(i) for i in tuned.stop_ids]
    lines += [f'PARAMETER stop "{word}"' for word in stops]
    if tuned.recipe.data.system:
        lines.append(f'SYSTEM """{tuned.recipe.data.system}"""')
    return "\n".join([*lines, "PARAMETER temperature 0"]) + "\n"


def template(renderer: Renderer) -> str:
    """Go's template of the same chats. Raises UsageError where a message's text depends on more than its role."""
    user = renderer.text([{"role": "user", "content": FIRST}], generate=True)
    both = renderer.text([{"role": "user", "content": FIRST}, {"role": "assistant", "content": SECOND}])
    again = renderer.text(
        [
            {"role": "user", "content": FIRST},
            {"role": "assistant", "content": SECOND},
            {"role": "user", "content": FIRST},
        ],
        generate=True,
    )
    before_user, _, after_user = user.partition(FIRST)
    before_answer, _, after_answer = both.partition(FIRST)[2].partition(SECOND)
    third = again.partition(SECOND)[2]
    second_user = third.partition(FIRST)[0].removeprefix(after_answer)
    if not third.startswith(after_answer) or not before_user.endswith(second_user) or before_answer != after_user:
        raise UsageError("deploy.template_too_clever", problem="turns are not written alike")
    # What stands before the first turn is a default system text.
    begin = before_user[: len(before_user) - len(second_user)]
    told = renderer.text([{"role": "system", "content": SECOND}, {"role": "user", "content": FIRST}], generate=True)
    before_system, found, after_system = told.partition(SECOND)
    after_system = after_system.partition(FIRST)[0]
    if not found or not after_system.endswith(second_user):
        raise UsageError("deploy.template_too_clever", problem="it has no place for a system text of its own")
    after_system = after_system[: len(after_system) - len(second_user)]
    return (
        "{{- if .System }}"
        + before_system
        + "{{ .System }}"
        + after_system
        + "{{ else }}"
        + begin
        + "{{ end }}{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 -}}"
        + '{{- if eq .Role "user" }}'
        + second_user
        + "{{ .Content }}"
        + "{{ if $last }}"
        + after_user
        + "{{ end }}"
        + '{{- else if eq .Role "assistant" }}'
        + before_answer
        + "{{ .Content }}"
        + after_answer
        + "{{ end }}{{- end }}"
    )

"""Chat templates: ChatML, and one that leaves system messages out without a word."""

CHATML = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
SILENT = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")

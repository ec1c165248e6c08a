// What a model writes, taken apart.

/** An answer as its chunks come: reasoning and tool calls as fields of their own, or still within the content. */
export class Answer {
  content = "";
  reasoning = "";
  called = [];
  tokens = 0;
  finish = null;

  add(chunk) {
    this.tokens = chunk.usage?.completion_tokens ?? this.tokens;
    const choice = chunk.choices[0];
    if (!choice) return;
    const delta = choice.delta;
    this.content += delta.content ?? "";
    this.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
    for (const part of delta.tool_calls ?? []) {
      const call = (this.called[part.index ?? 0] ??= { id: "", name: "", arguments: "" });
      call.id ||= part.id ?? "";
      call.name += part.function?.name ?? "";
      call.arguments += part.function?.arguments ?? "";
    }
    this.finish = choice.finish_reason ?? this.finish;
  }

  get parts() {
    const { thought, rest, open } = splitThinking(this.content);
    const { text, calls } = splitCalls(rest);
    return {
      thought: this.reasoning.trim() || thought,
      thinks: open || Boolean(this.reasoning && !this.content.trim() && !this.called.length && !this.finish),
      text: text.trim(),
      calls: [...this.called, ...calls].map((call, index) => ({ ...call, id: call.id || `call-${index}` })),
    };
  }
}

const THINK = "<think>";
const THOUGHT = "</think>";

function splitThinking(content) {
  const end = content.indexOf(THOUGHT);
  const begun = content.trimStart();
  if (end >= 0) {
    const thought = content.slice(0, end).replace(THINK, "").trim();
    return { thought, rest: content.slice(end + THOUGHT.length), open: false };
  }
  if (begun.startsWith(THINK)) return { thought: begun.slice(THINK.length).trim(), rest: "", open: true };
  if (begun && THINK.startsWith(begun)) return { thought: "", rest: "", open: true };
  return { thought: "", rest: content, open: false };
}

function splitCalls(content) {
  const calls = [];
  const text = content.replace(/<tool_call>\s*([^]*?)\s*(?:<\/tool_call>|<\/?[a-z_]*$|$)/g, (_, written) => {
    try {
      const { name, arguments: given } = JSON.parse(written);
      calls.push({ name, arguments: JSON.stringify(given ?? {}) });
    } catch {
      // Not all of it is here yet, or the model has made a mistake.
      const name = written.match(/"name"\s*:\s*"([^"]+)"/)?.[1] ?? "";
      calls.push({ name, arguments: written.split(/"arguments"\s*:\s*/)[1] ?? "" });
    }
    return "";
  });
  return { text, calls };
}

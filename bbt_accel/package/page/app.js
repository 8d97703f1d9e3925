// The tokenizer and the graph are files of this folder; nothing is asked of any other host.
import { PreTrainedTokenizer } from "./vendor/transformers.js";
import { InferenceSession, Tensor, env } from "./vendor/ort.js";

env.wasm.wasmPaths = { wasm: new URL("./vendor/ort-wasm-simd-threaded.wasm", import.meta.url).href };

const element = (id) => document.getElementById(id);

async function get(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file} is missing (${response.status})`);
  return response;
}

const json = async (file) => (await get(file)).json();

/** A new element with a class, attributes and text. */
function make(tag, { text, ...attributes } = {}) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

/** The bytes of a file; tells how many of them have arrived. */
async function download(file) {
  const response = await get(file);
  const size = Number(response.headers.get("Content-Length")) || 0;
  const parts = [];
  let done = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { value, done: ended } = await reader.read();
    if (ended) break;
    parts.push(value);
    done += value.length;
    // Of a compressed answer, the size is that of the compressed bytes.
    if (size) say(`Loading the model, ${Math.min(99, Math.floor((100 * done) / size))} %…`);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

class Classifier {
  static async load() {
    const [info, tokenizer, configuration] = await Promise.all(
      ["bbt_accel.json", "model/tokenizer.json", "model/tokenizer_config.json"].map(json));
    const session = await InferenceSession.create(await download(info.model), { executionProviders: ["wasm"] });
    return Object.assign(new Classifier(), {
      info, session, tokenizer: new PreTrainedTokenizer(tokenizer, configuration),
    });
  }

  /** Probabilities of the labels for a text, or a pair of texts. */
  async probabilities(texts) {
    const [text, pair = null] = texts;
    const given = this.tokenizer(text, { text_pair: pair, truncation: true });
    const feeds = {};
    for (const name of ["input_ids", "attention_mask"]) {
      feeds[name] = new Tensor("int64", given[name].data, given[name].dims);
    }
    const { logits } = await this.session.run(feeds);
    const largest = Math.max(...logits.data);
    const shares = Array.from(logits.data, (value) => Math.exp(value - largest));
    const sum = shares.reduce((a, b) => a + b);
    return shares.map((share) => share / sum);
  }
}

/** The lines of every field: one array of texts for each row. The last line may be empty. */
function rows(columns) {
  const lines = columns.map((_, i) => element(`field-${i}`).value.replace(/\n$/, "").split("\n"));
  const count = Math.max(...lines.map((own) => own.length));
  return Array.from({ length: count }, (_, i) => lines.map((own) => own[i] ?? ""));
}

function bar(share) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  for (const [name, value] of [["width", `${100 * share}%`], ["height", "100%"], ["rx", "2"]]) {
    rect.setAttribute(name, value);
  }
  svg.setAttribute("aria-hidden", "true"); // the number beside it says the same
  svg.append(rect);
  return svg;
}

/** A result as a list entry: the text, a bar for each label, the most probable first, and the time it took. */
function result(texts, labels, probabilities, milliseconds) {
  const entry = make("li");
  for (const text of texts) entry.append(make("p", { class: "text", text }));
  const table = make("table");
  table.append(make("caption", { class: "unseen", text: "Probability of each label" }));
  const order = labels.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  for (const i of order) {
    const line = make("tr", i === order[0] ? { class: "first" } : {});
    const share = make("td", { class: "share", text: `${(100 * probabilities[i]).toFixed(1)} %` });
    share.dataset.label = labels[i];
    share.dataset.probability = probabilities[i];
    const drawn = make("td");
    drawn.append(bar(probabilities[i]));
    line.append(make("th", { scope: "row", text: labels[i] }), drawn, share);
    table.append(line);
  }
  entry.append(table, make("p", { class: "time", text: `${milliseconds.toFixed(0)} ms` }));
  return entry;
}

let busy = false; // a disabled button would lose the focus

function work(begins) {
  busy = begins;
  element("classify").setAttribute("aria-disabled", begins);
  element("results-section").setAttribute("aria-busy", begins);
}

function show(entries) {
  element("results").replaceChildren(...entries);
  element("results-section").hidden = !entries.length;
  for (const text of document.querySelectorAll(".text")) {
    if (text.scrollHeight > text.clientHeight) text.tabIndex = 0; // a long one is scrolled by keyboard
  }
}

async function classify(classifier) {
  if (busy) return;
  const { columns, labels } = classifier.info;
  const entries = [];
  work(true);
  try {
    const given = rows(columns);
    for (const texts of given) {
      say(`Classifying text ${entries.length + 1} of ${given.length}…`);
      await new Promise((painted) => setTimeout(painted)); // the model computes in this thread
      const start = performance.now();
      const found = await classifier.probabilities(texts);
      entries.push(result(texts, labels, found, performance.now() - start));
    }
    show(entries);
    say(`${entries.length === 1 ? "1 text" : `${entries.length} texts`} classified. The results are below.`);
  } catch (error) {
    show(entries);
    say(`Text ${entries.length + 1} could not be classified (${error.message}).`, true);
  } finally {
    work(false);
  }
}

function showForm(info) {
  document.title = element("title").textContent = `${info.task}: ${info.labels.join(", ")}`.slice(0, 90);
  info.columns.forEach((column, i) => {
    const field = make("textarea", { id: `field-${i}`, "aria-describedby": "hint", spellcheck: "false" });
    element("fields").append(make("label", { for: `field-${i}`, text: column }), field);
  });
  if (info.columns.length > 1) {
    element("hint").textContent = "One text per line; the lines of both fields belong together. Ctrl+Enter classifies.";
  }
}

try {
  say("Loading the model…");
  showForm(await json("bbt_accel.json"));
  const classifier = await Classifier.load();
  element("form").addEventListener("submit", (event) => {
    event.preventDefault();
    classify(classifier);
  });
  element("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("form").requestSubmit(element("classify"));
  });
  element("classify").disabled = false;
  say("Ready.");
} catch (error) {
  say(`The model could not be loaded (${error.message}).`, true);
}

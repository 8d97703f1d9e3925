// Packages in transformers.js: node transformers_js.mjs REQUEST.json REPLY.json
import { AutoModel, AutoTokenizer, PretrainedConfig, env, pipeline, softmax } from "@huggingface/transformers";
import fs from "node:fs";
import path from "node:path";

const [request, reply] = process.argv.slice(2);
const version = (name) => JSON.parse(fs.readFileSync(`node_modules/${name}/package.json`, "utf8")).version;
// Sums of 8-bit products are exact on processors without VNNI as well.
const WIDE_SUMS = { extra: { session: { x64quantprecision: "1" } } };
env.allowRemoteModels = false;

/** Probabilities of texts through the pipeline, whose task takes no pairs. */
async function throughPipeline(name, labels, texts) {
  const classify = await pipeline("text-classification", name, { session_options: WIDE_SUMS });
  const rows = (found) => found.map((row) => labels.map((label) => row.find((entry) => entry.label === label).score));
  const one = [];
  for (const text of texts) one.push(rows([await classify(text, { top_k: null })])[0]);
  return { one, batch: rows(await classify(texts, { top_k: null })) };
}

/** Of pairs, and of models that transformers.js does not list as classifiers: its "custom" type of model. */
async function throughModel(name, config, texts) {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const custom = new PretrainedConfig({ ...config, model_type: "custom", architectures: [] });
  const model = await AutoModel.from_pretrained(name, { config: custom, session_options: WIDE_SUMS });
  const pairs = Array.isArray(texts[0]);
  const run = async (given) => {
    const first = pairs ? given.map((pair) => pair[0]) : given;
    const options = { padding: true, truncation: true, ...(pairs ? { text_pair: given.map((pair) => pair[1]) } : {}) };
    const { logits } = await model(tokenizer(first, options));
    return logits.tolist().map((row) => softmax(row));
  };
  const one = [];
  for (const text of texts) one.push((await run([text]))[0]);
  return { one, batch: await run(texts) };
}

const found = {};
for (const [name, { folder, texts, listed }] of Object.entries(JSON.parse(fs.readFileSync(request, "utf8")))) {
  env.localModelPath = path.dirname(folder);
  const config = JSON.parse(fs.readFileSync(path.join(folder, "config.json"), "utf8"));
  const labels = Object.values(config.id2label);
  found[name] = listed && !Array.isArray(texts[0])
    ? await throughPipeline(path.basename(folder), labels, texts)
    : await throughModel(path.basename(folder), config, texts);
}
const versions = Object.fromEntries(["@huggingface/transformers", "onnxruntime-node"].map((name) => [name, version(name)]));
fs.writeFileSync(reply, JSON.stringify({ versions: { ...versions, node: process.version.slice(1) }, found }));

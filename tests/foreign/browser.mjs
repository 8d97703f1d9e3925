// The page of a web package in Chromium: node browser.mjs URL TEXTS.json OUT.json SCREENSHOTS CHROMIUM
// Exits with 1 for an error on the console, a request to another host, or a page that cannot be used by keyboard.
import { chromium } from "playwright-core";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";

const [url, textsFile, out, screenshots, executablePath] = process.argv.slice(2);
const texts = JSON.parse(fs.readFileSync(textsFile, "utf8"));
// A text, or a pair of texts, has a line in each field.
const rows = texts.map((text) => [text].flat().map((own) => own.replace(/\s*\n\s*/g, " ")));
const flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const problems = [];

const profile = fs.mkdtempSync(path.join(os.tmpdir(), "profile-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath, headless: true, args: flags, viewport: { width: 900, height: 1000 }, colorScheme: "light",
});
const page = context.pages()[0] ?? await context.newPage();
page.on("console", (m) => { if (m.type() === "error" || m.type() === "warning") problems.push(`console: ${m.text()}`); });
page.on("pageerror", (error) => problems.push(`page: ${error.message}`));
context.on("request", (request) => {
  const { protocol, origin } = new URL(request.url());
  if (/^(data|blob):$/.test(protocol)) return;
  if (origin !== new URL(url).origin) problems.push(`request: ${request.url()}`);
});

const loaded = Date.now();
await page.goto(url);
await page.waitForFunction(() => document.getElementById("status").textContent !== ""
  && !document.getElementById("status").textContent.startsWith("Loading"), null, { timeout: 120000 });
const loadTime = Date.now() - loaded;
const status = () => page.textContent("#status");
if ((await status()) !== "Ready.") problems.push(`status: ${await status()}`);

// By keyboard alone: the fields come first, then the button.
const focused = () => page.evaluate(() => document.activeElement.id);
for (const i of rows[0].keys()) {
  await page.keyboard.press("Tab");
  if ((await focused()) !== `field-${i}`) problems.push(`focus: ${await focused()}, not field ${i}`);
  await page.keyboard.insertText(rows.map((row) => row[i]).join("\n"));
}
await page.keyboard.press("Tab");
if ((await focused()) !== "classify") problems.push(`focus: ${await focused()}, not the button`);
await page.keyboard.press("Enter");
await page.waitForFunction(() => /classified|could not/.test(document.getElementById("status").textContent), null,
  { timeout: 300000 });

if ((await focused()) !== "classify") problems.push(`focus: ${await focused()}, lost by the button`);

const found = await page.$$eval("#results > li", (entries) => entries.map((entry) => ({
  text: entry.querySelector(".text").textContent,
  time: Number.parseFloat(entry.querySelector(".time").textContent),
  probabilities: Object.fromEntries([...entry.querySelectorAll("td.share")].map(
    (cell) => [cell.dataset.label, Number(cell.dataset.probability)])),
})));
if (found.length !== rows.length) problems.push(`${found.length} results for ${rows.length} texts`);

// What a screen reader is told.
const snapshot = await page.locator("body").ariaSnapshot();
for (const wanted of ["textbox", "button \"Classify\"", "rowheader", "status", "heading \"Results\""]) {
  if (!snapshot.includes(wanted)) problems.push(`screen reader: no ${wanted}`);
}
for (const colorScheme of ["light", "dark"]) {
  await page.emulateMedia({ colorScheme });
  await page.screenshot({ path: path.join(screenshots, `${colorScheme}.png`) });
}
await page.setViewportSize({ width: 380, height: 800 });
const wide = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
if (wide) problems.push("a narrow window scrolls sideways");
await page.screenshot({ path: path.join(screenshots, "narrow.png") });
await context.close();
fs.rmSync(profile, { recursive: true, force: true });
fs.writeFileSync(out, JSON.stringify({ loadTime, found, problems, snapshot }));
if (problems.length) {
  console.error(problems.join("\n"));
  process.exit(1);
}

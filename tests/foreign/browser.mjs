// The page of a web package in Chromium: node browser.mjs URL TEXTS.json OUT.json SCREENSHOTS CHROMIUM
// Exits with 1 for what chromium.mjs refuses, and for a page that cannot be used by keyboard.
import fs from "node:fs";
import { checkLooks, withPage } from "./chromium.mjs";

const [url, textsFile, out, screenshots, executablePath] = process.argv.slice(2);
const texts = JSON.parse(fs.readFileSync(textsFile, "utf8"));
// A text, or a pair of texts, has a line in each field.
const rows = texts.map((text) => [text].flat().map((own) => own.replace(/\s*\n\s*/g, " ")));
const problems = [];

await withPage(executablePath, url, problems, async (page) => {
  const loaded = Date.now();
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("status").textContent !== ""
    && !/^(Loading|If this line)/.test(document.getElementById("status").textContent), null, { timeout: 120000 });
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
  await checkLooks(page, screenshots, problems);
  fs.writeFileSync(out, JSON.stringify({ loadTime, found, problems, snapshot }));
});
if (problems.length) {
  console.error(problems.join("\n"));
  process.exit(1);
}

// What every page has to pass in Chromium: no error, no request to another host, and axe's rules for accessibility.
import { createRequire } from "node:module";
import { chromium } from "playwright-core";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";

const flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const axe = fs.readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
export const axeVersion = createRequire(import.meta.url)("axe-core/package.json").version;

/** Calls `use(page)` on a page of its own; what the page does wrong is added to `problems`. */
export async function withPage(executablePath, url, problems, use) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), "profile-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath, headless: true, args: flags, viewport: { width: 900, height: 1000 }, colorScheme: "light",
  });
  const page = context.pages()[0] ?? await context.newPage();
  page.on("console", (m) => { if (/error|warning/.test(m.type())) problems.push(`console: ${m.text()}`); });
  page.on("pageerror", (error) => problems.push(`page: ${error.message}`));
  context.on("request", (request) => {
    const { protocol, origin } = new URL(request.url());
    if (/^(data|blob):$/.test(protocol)) return;
    if (origin !== new URL(url).origin) problems.push(`request: ${request.url()}`);
  });
  await use(page);
  await context.close();
  fs.rmSync(profile, { recursive: true, force: true });
}

/** Light, dark and narrow: axe's rules, a screenshot of each, and no scrolling sideways. */
export async function checkLooks(page, screenshots, problems) {
  fs.mkdirSync(screenshots, { recursive: true });
  await page.evaluate(axe); // not as a script element, which a page's content security policy may refuse
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    await page.screenshot({ path: path.join(screenshots, `${colorScheme}.png`), fullPage: true });
    for (const { id, help, nodes } of (await page.evaluate(() => axe.run())).violations) {
      problems.push(`axe, ${colorScheme}: ${id} (${help}) at ${nodes.map((node) => node.target).join(", ")}`);
    }
  }
  await page.setViewportSize({ width: 380, height: 800 });
  const wide = await page.evaluate(() => document.documentElement.scrollWidth > document.documentElement.clientWidth);
  if (wide) problems.push("a narrow window scrolls sideways");
  await page.screenshot({ path: path.join(screenshots, "narrow.png") });
}

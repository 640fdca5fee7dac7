// Runs the rules of rules.mjs with the unmodified @fal-ai/client, many at a time, in one process:
//
//   node harness.mjs <recipe>   (on standard input: {"base": "https://...", "tlsPort": 8443, "keys": {"own": ..., ...} or null,
//                                           "rules": [the names of those to check]})
//
// and prints {"<rule's name>": null, or why it does not hold}. The recipes are those of fal-queue-protocol.md, section 1.4:
//   J1  the client's proxy setting
//   J2  its middleware
//   J3  nothing but a DNS that leads fal's hosts here, and our CA. The name lookups of this process stand for the DNS.
import assert from "node:assert/strict";
import { AsyncLocalStorage } from "node:async_hooks";
import { readFileSync } from "node:fs";
import http from "node:http";
import tls from "node:tls";

const FAL = /(^|\.)fal\.(run|ai|media)$/;
const recipe = process.argv[2];
const { base, tlsPort, keys, rules: chosen } = JSON.parse(readFileSync(0, "utf8"));

if (recipe === "J3") {
  const connect = tls.connect;
  tls.connect = (options, ...rest) =>
    FAL.test(options.host) ? connect({ ...options, host: "127.0.0.1", port: tlsPort }, ...rest) : connect(options, ...rest);
}

// What each rule's calls were answered, whatever the client makes of it.
const current = new AsyncLocalStorage();
const everything = [];
const plainFetch = globalThis.fetch;
globalThis.fetch = async (url, init = {}) => {
  const response = await plainFetch(url, init);
  const target = new Headers(init.headers).get("x-fal-target-url") ?? String(url);
  const call = { method: init.method ?? "GET", url: target, status: response.status, headers: response.headers };
  everything.push(call);
  current.getStore()?.push(call);
  return response;
};

const { createFalClient, ...client } = await import("@fal-ai/client");

const PREFIXES = { "queue.fal.run": "/queue", "fal.run": "/run", "rest.fal.ai": "/rest" };
const prefixed = (url) => url.replace(/^https:\/\/(queue\.fal\.run|fal\.run|rest\.fal\.ai)/, (_, host) => base + PREFIXES[host]);
const SETTINGS = {
  J1: { proxyUrl: { url: `${base}/api/fal/proxy`, when: "always" } },
  J2: { requestMiddleware: async (request) => ({ ...request, url: prefixed(request.url) }) },
  J3: {},
}[recipe];
const clientWith = (credentials, more = {}) => createFalClient({ ...SETTINGS, ...(credentials ? { credentials } : {}), ...more });

// A call of ours to one of fal's URLs, on the way that the recipe takes.
const raw = (url, init = {}) => {
  const headers = { ...(keys ? { authorization: `Key ${keys.own}` } : {}), ...init.headers };
  if (recipe === "J1") return fetch(`${base}/api/fal/proxy`, { ...init, headers: { ...headers, "x-fal-target-url": url } });
  return fetch(recipe === "J2" ? prefixed(url) : url, { ...init, headers });
};

// The error that a promise ends with.
const failure = async (work, kind = client.ApiError) => {
  const error = await work.then(
    (value) => assert.fail(`no error but ${JSON.stringify(value)}`),
    (thrown) => thrown,
  );
  assert.ok(error instanceof kind, `${error.name}: ${error.message}`);
  return error;
};

// A receiver of webhooks.
const waiting = new Map();
const receiver = http.createServer((request, response) => {
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => {
    response.end();
    waiting.get(request.url)?.({ headers: request.headers, body: Buffer.concat(chunks) });
  });
});
await new Promise((listening) => receiver.listen(0, "127.0.0.1", listening));
const hook = (path) => ({
  url: `http://127.0.0.1:${receiver.address().port}${path}`,
  delivery: new Promise((delivered) => waiting.set(path, delivered)),
});

const rules = [];
// A rule may have options, {only: recipes that it is checked under, withKeys: true if not on an open service}: `conformance.py`
// reads them, and chooses.
const rule = (name, text, check) => {
  if (rules.some((each) => each.name === name)) throw new Error(`two rules are called ${name}`);
  rules.push({ name, text, check });
};
const fal = clientWith(keys?.own);
const context = { ...client, fal, raw, failure, hook, keys, base, recipe, clientWith, everything, chosen };
for (const file of ["./rules.mjs", "./uploads.mjs"]) (await import(file)).default(rule, context);

const LIMIT_MS = 90_000;
const AT_ONCE = 16;
const outcome = async ({ text, check }) => {
  const calls = [];
  const late = new Promise((_, reject) => setTimeout(reject, LIMIT_MS, new Error("not within 90 s")).unref());
  try {
    await current.run(calls, () => Promise.race([check(calls), late]));
    return null;
  } catch (error) {
    const seen = calls.map(({ method, url, status }) => `${method} ${url} ${status}`).join("\n");
    return `${text}\n${error.stack ?? error}\n${JSON.stringify(error.body ?? null)}\n${seen}`;
  }
};
const warn = console.warn;
console.warn = () => {}; // of default token providers
const asked = rules.filter((each) => chosen.includes(each.name));
const last = asked.filter((each) => each.name.startsWith("every-"));
const first = asked.filter((each) => !last.includes(each));
const outcomes = {};
for (const some of [first, last]) {
  const left = some.values();
  const work = async () => {
    for (const each of left) outcomes[each.name] = await outcome(each);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
}
console.warn = warn;
process.stdout.write(JSON.stringify(outcomes), () => process.exit(0));

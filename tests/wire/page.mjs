// What an application does with the unmodified @fal-ai/client, one operation a run:
//
//   node page.mjs <base url> <operation>   (its arguments as JSON on standard input: a word has 128 KB at most)
//
// prints one line of JSON: {"value": ...} or {"error": ...}, with what the page's callbacks saw beside it. `subscribe` is the
// code of fal's endpoint pages; the client is pointed at us by its own proxy setting and nothing else.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";

import { fal } from "@fal-ai/client";

const [base, operation] = process.argv.slice(2);
const { id, ...options } = JSON.parse(readFileSync(0, "utf8"));
const updates = [];
const printed = [];
const print = console.log;
console.log = (line) => printed.push(line);

fal.config({ proxyUrl: { url: `${base}/api/fal/proxy`, when: "always" } });

const operations = {
  subscribe: () =>
    fal.subscribe(id, {
      input: options.input,
      logs: true,
      onQueueUpdate: (update) => {
        updates.push(update);
        if (update.status === "IN_PROGRESS") {
          update.logs.map((log) => log.message).forEach(console.log);
        }
      },
      ...options,
    }),
  submit: () => fal.queue.submit(id, options),
  submitAll: () => Promise.all(options.submits.map((each) => fal.queue.submit(id, each))),
  status: () => fal.queue.status(id, options),
  result: () => fal.queue.result(id, options),
  upload: async () => {
    // the sum is of what was sent, and the methods are those of every call
    const methods = [];
    const counted = (url, init) => (methods.push(init.method), fetch(url, init));
    fal.config({ proxyUrl: { url: `${base}/api/fal/proxy`, when: "always" }, fetch: counted });
    const bytes = Buffer.alloc(options.size, createHash("sha512").update("noise").digest());
    const url = await fal.storage.upload(new File([bytes], options.name, { type: options.type }));
    return { url, sha256: createHash("sha256").update(bytes).digest("hex"), methods };
  },
};

const described = ({ name, message, status, body, requestId, fieldErrors, isUserTimeout }) => ({
  name, message, status, body, requestId, fieldErrors, isUserTimeout,
});

const outcome = await operations[operation]().then(
  (value) => ({ value: value ?? null }),
  (error) => ({ error: described(error) }),
);
print(JSON.stringify({ ...outcome, updates, printed }));

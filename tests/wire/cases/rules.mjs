// What @fal-ai/client relies on: one rule a case, with the section of fal-queue-protocol.md that it is from.
import assert from "node:assert/strict";
import { createHash, createPublicKey, verify } from "node:crypto";

const ANIMATEDIFF = "fal-ai/animatediff-sparsectrl-lcm";
const CONTROLNEXT = "fal-ai/controlnext";
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;
const NOBODY = "00000000-0000-4000-8000-000000000000";
const STEPS = ["step 1/4", "step 2/4", "step 3/4", "step 4/4"];
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

export default function define(rule, context) {
  const { fal, raw, failure, hook, keys, base, recipe, clientWith, everything, chosen, ValidationError } = context;
  const queueUrl = (id, rest = "") => `https://queue.fal.run/${ANIMATEDIFF}/requests/${id}${rest}`;
  const submit = async (prompt, options = {}) =>
    (await fal.queue.submit(ANIMATEDIFF, { input: { prompt, seed: 42 }, ...options })).request_id;
  const status = (requestId, logs = true, id = ANIMATEDIFF) => fal.queue.status(id, { requestId, logs });
  const result = (requestId, id = ANIMATEDIFF) => fal.queue.result(id, { requestId });
  const cancel = (requestId) => fal.queue.cancel(ANIMATEDIFF, { requestId });
  const until = async (requestId, state) => {
    for (;;) {
      const seen = await status(requestId);
      if (seen.status === state) return seen;
      await sleep(100);
    }
  };
  const done = async (prompt, options) => {
    const id = await submit(prompt, options);
    await until(id, "COMPLETED");
    return id;
  };

  // Submit.

  rule("submit-answer", "2.1: a submission is answered IN_QUEUE with an id", async () => {
    const answer = await fal.queue.submit(ANIMATEDIFF, { input: { prompt: "x" } });
    assert.equal(answer.status, "IN_QUEUE");
    assert.match(answer.request_id, UUID);
    assert.equal(answer.gateway_request_id, answer.request_id);
    assert.equal(typeof answer.queue_position, "number");
  });
  rule("submit-urls", "2.1: the URLs have owner and alias only, and no /response", async () => {
    const answer = await fal.queue.submit(ANIMATEDIFF, { input: { prompt: "x" } });
    assert.ok(answer.response_url.endsWith(`/${ANIMATEDIFF}/requests/${answer.request_id}`));
    assert.equal(answer.status_url, `${answer.response_url}/status`);
    assert.equal(answer.cancel_url, `${answer.response_url}/cancel`);
  });
  rule("submit-urls-are-reachable", "2.1: the URLs' base is the one that the caller used", async () => {
    const { status_url: url } = await fal.queue.submit(ANIMATEDIFF, { input: { prompt: "held" } });
    assert.equal((await fetch(url, { headers: keys ? { authorization: `Key ${keys.own}` } : {} })).status, 202);
  });
  rule("submit-is-200", "2.1: some clients take no other code than 200", async (calls) => {
    await submit("x");
    assert.deepEqual(calls.map((call) => call.status), [200]);
  });
  rule("submit-request-id-header", "9.1: the answer's x-fal-request-id is the request's", async (calls) => {
    assert.equal(await submit("x"), calls[0].headers.get("x-fal-request-id"));
  });
  rule("submit-options", "2.1: priority, hint, start timeout, lifecycle and further headers are taken", async (calls) => {
    await submit("x", {
      priority: "low",
      hint: "lora:a",
      startTimeout: 30,
      storageSettings: { expiresIn: "1d" },
      headers: { "X-Fal-Store-IO": "1", "X-Fal-No-Retry": "1" },
    });
    assert.equal(calls[0].headers.get("x-reelray-ignored-headers"), "x-fal-runner-hint");
  });
  rule("submit-priority-always", "2.1: the client always sends a priority", async (calls) => {
    await submit("x");
    assert.equal(calls[0].headers.get("x-reelray-ignored-headers"), null);
  });
  rule("submit-webhook-query", "2.1: the webhook's URL is in the query, with a query of its own", async () => {
    assert.match(await submit("x", { webhookUrl: "https://hook.example/w?x=1&y=%20" }), UUID);
  });
  rule("submit-no-input", "2.1: an empty body is {}", async () => {
    const error = await failure(fal.queue.submit(ANIMATEDIFF, {}), ValidationError);
    assert.deepEqual(error.getFieldErrors("prompt").map(({ loc, type }) => [loc, type]), [[["body", "prompt"], "missing"]]);
  });
  rule("submit-invalid", "6.1: a wrong value is a 422 with its field, at once", async (calls) => {
    const error = await failure(fal.queue.submit(ANIMATEDIFF, { input: { prompt: "x", num_inference_steps: 0 } }), ValidationError);
    const [fault] = error.getFieldErrors("num_inference_steps");
    assert.deepEqual([fault.type, fault.ctx, error.status], ["greater_than_equal", { ge: 1 }, 422]);
    assert.match(error.requestId, UUID);
    assert.equal(calls.length, 1, "422 is not repeated");
  });
  rule("submit-invalid-many", "6.1: every wrong field is told", async () => {
    const input = { prompt: "", controlnet_type: "depth", guidance_scale: 99 };
    const error = await failure(fal.queue.submit(ANIMATEDIFF, { input }), ValidationError);
    assert.deepEqual(error.fieldErrors.map(({ loc }) => loc[1]).sort(), ["controlnet_type", "guidance_scale", "prompt"]);
    assert.ok(error.fieldErrors.every(({ url, type }) => url === `https://docs.fal.ai/errors#${type}`));
  });
  rule("submit-invalid-with-webhook", "2.1: with a webhook the 422 comes with the result", async () => {
    const { request_id: id } = await fal.queue.submit(ANIMATEDIFF, { input: {}, webhookUrl: "https://hook.example/" });
    assert.equal((await status(id)).error_type, "missing");
    assert.equal((await failure(result(id), ValidationError)).getFieldErrors("prompt").length, 1);
  });
  rule("submit-json", "6.3: a body that is no JSON is a 422", async () => {
    const answer = await raw(`https://queue.fal.run/${ANIMATEDIFF}`, { method: "POST", body: "{" });
    assert.deepEqual([answer.status, (await answer.json()).detail[0].type], [422, "json_invalid"]);
  });
  rule("submit-unknown-endpoint", "6.2: an unknown path is a 404 with a text, and is not repeated", async (calls) => {
    const error = await failure(fal.queue.submit("fal-ai/no-such-model", { input: {} }));
    assert.deepEqual([error.status, error.body.error_type, typeof error.body.detail], [404, "not_found", "string"]);
    assert.equal(calls[0].headers.get("x-fal-error-type"), "not_found");
    assert.equal(calls.length, 1);
  });
  rule("submit-idempotency-key", "ours: the same key and input are answered with the same request", async () => {
    const headers = { "Idempotency-Key": `${recipe} same` };
    assert.equal(await submit("x", { headers }), await submit("x", { headers }));
  });
  rule("submit-idempotency-key-reused", "ours: another input under the same key is a 422", async () => {
    const headers = { "Idempotency-Key": `${recipe} other` };
    await submit("x", { headers });
    assert.equal((await failure(submit("y", { headers }))).body.error_type, "idempotency_key_reused");
  });
  rule("submit-unknown-fields", "D18: fields that an endpoint does not have are ignored and named", async (calls) => {
    await fal.queue.submit(ANIMATEDIFF, { input: { prompt: "x", duration: 5 } });
    assert.equal(calls[0].headers.get("x-reelray-ignored-fields"), "duration");
  });
  rule("submit-data-uri", "4: a data URI in the input is an ordinary string", async () => {
    const image = `data:image/png;base64,${Buffer.alloc(60_000, 7).toString("base64")}`;
    assert.match((await fal.queue.submit(ANIMATEDIFF, { input: { prompt: "x", keyframe_0_image_url: image, keyframe_0_index: 0 } })).request_id, UUID);
  });
  rule("submit-retry-config", "2.1: what a retry config cannot do is named", async (calls) => {
    const config = { timeout: { retries: 0 }, server_error: { retries: 3 }, weather: { retries: 1 } };
    await submit("x", { headers: { "X-Fal-Retry-Config": JSON.stringify(config) } });
    assert.equal(calls[0].headers.get("x-reelray-ignored-headers"), "x-fal-retry-config%3A%20weather");
  });
  rule("submit-no-retry-wins", "2.1: x-fal-no-retry wins over a retry config", async (calls) => {
    await submit("x", { headers: { "x-fal-no-retry": "yes", "x-fal-retry-config": '{"timeout":{"retries":1}}' } });
    assert.equal(calls[0].headers.get("x-reelray-ignored-headers"), "x-fal-retry-config");
  });
  rule("submit-bad-timeout", "6.2: a bad timeout header is a 400, bad_request", async () => {
    const error = await failure(submit("x", { headers: { "x-fal-request-timeout": "soon" } }));
    assert.deepEqual([error.status, error.body.error_type], [400, "bad_request"]);
  });
  rule("submit-max-queue-length", "2.1: fal_max_queue_length is a 429 where more requests wait", async () => {
    const limited = await raw(`https://queue.fal.run/${CONTROLNEXT}?fal_max_queue_length=x`, { method: "POST", body: "{}" });
    assert.equal(limited.status, 400);
  });

  // Status.

  rule("status-in-queue", "2.2: IN_QUEUE has a position, and 202", async (calls) => {
    const seen = await until(await submit("held"), "IN_QUEUE");
    assert.deepEqual([typeof seen.queue_position, calls[1].status], ["number", 202]);
  });
  rule("status-in-progress", "2.2: IN_PROGRESS has the logs as an array, and 202", async (calls) => {
    const id = await submit("endless");
    const seen = await until(id, "IN_PROGRESS");
    assert.ok(Array.isArray(seen.logs));
    assert.equal(calls.at(-1).status, 202);
    await cancel(id);
  });
  rule("status-completed", "2.2: COMPLETED has the inference time, and 200", async (calls) => {
    const seen = await status(await done("x"));
    assert.equal(typeof seen.metrics.inference_time, "number");
    assert.deepEqual([calls.at(-1).status, seen.error, seen.queue_position], [200, undefined, undefined]);
  });
  rule("status-urls", "2.2: every status has the request's id and URLs", async () => {
    const id = await done("x");
    const seen = await status(id, false);
    assert.equal(seen.request_id, id);
    assert.ok(seen.response_url.endsWith(id) && seen.status_url.endsWith("/status") && seen.cancel_url.endsWith("/cancel"));
  });
  rule("status-logs-off", "2.2: without logs they are null, and the key is there", async () => {
    const seen = await status(await done("x"), false);
    assert.ok("logs" in seen && seen.logs === null);
  });
  rule("status-logs-on", "2.2: with logs an array, even an empty one", async () => {
    assert.deepEqual((await status(await submit("held"))).logs, []);
  });
  rule("status-logs-all", "2.2: polling returns all logs so far, each time", async () => {
    const id = await done("x");
    for (let k = 0; k < 2; k++) assert.deepEqual((await status(id)).logs.map(({ message }) => message), STEPS);
  });
  rule("status-log-item", "2.2: a log item has message, level, source and timestamp", async () => {
    const [item] = (await status(await done("x"))).logs;
    assert.deepEqual([item.message, item.level, item.source, item.labels.level], ["step 1/4", "INFO", "USER", "INFO"]);
    assert.ok(Math.abs(Date.now() - Date.parse(item.timestamp)) < 60_000);
    assert.ok(/(\+00:00|Z)$/.test(item.timestamp));
  });
  rule("status-log-progress", "ours: a line of progress is there for programs too", async () => {
    const item = (await status(await done("x"))).logs[3];
    assert.deepEqual([item.seq, item.progress.stage, item.progress.step], [4, "denoise", { done: 4, total: 4 }]);
  });
  rule("status-equal", "8: repeated statuses of an ended request are equal", async () => {
    const id = await done("x");
    assert.deepEqual(await status(id), await status(id));
  });
  rule("status-flags", "9.8: logs may be 1, 0, true or false", async () => {
    const id = await done("x");
    for (const [flag, logs] of [["1", true], ["true", true], ["0", false], ["false", false]])
      assert.equal(Array.isArray((await (await raw(queueUrl(id, `/status?logs=${flag}`))).json()).logs), logs);
  });
  rule("status-unknown", "2.2: an unknown id is a 404, NOT_FOUND", async (calls) => {
    const error = await failure(status(NOBODY));
    assert.deepEqual([error.status, error.body, calls.length], [404, { status: "NOT_FOUND" }, 1]);
  });
  rule("status-no-id", "2.2: what is no id is as unknown", async () => {
    assert.equal((await failure(status("nonsense"))).status, 404);
  });
  rule("status-other-endpoint", "1.1: a request is not found under another endpoint", async () => {
    assert.equal((await failure(status(await submit("x"), true, CONTROLNEXT))).status, 404);
  });
  rule("status-failed", "2.2: a failed request is COMPLETED with an error", async () => {
    const seen = await status(await done("fails RunnerFailed"));
    assert.deepEqual([seen.status, seen.error_type, typeof seen.error], ["COMPLETED", "runner_server_error", "string"]);
  });
  rule("status-full-id", "2.1: paths with the full id and more are taken too", async () => {
    const id = await submit("held");
    assert.equal((await raw(`https://queue.fal.run/${ANIMATEDIFF}/some/path/requests/${id}/status`)).status, 202);
  });

  // The stream of statuses.

  rule("status-stream-events", "2.3: each event has the new logs only, the last is COMPLETED", async () => {
    const stream = await fal.queue.streamStatus(ANIMATEDIFF, { requestId: await submit("x"), logs: true });
    const seen = [];
    for await (const event of stream) seen.push(event);
    assert.deepEqual(seen.flatMap(({ logs }) => logs).map(({ message }) => message), STEPS);
    assert.equal(seen.at(-1).status, "COMPLETED");
  });
  rule("status-stream-done", "2.3: the stream resolves with its last status", async () => {
    const stream = await fal.queue.streamStatus(ANIMATEDIFF, { requestId: await submit("x") });
    assert.equal((await stream.done()).status, "COMPLETED");
  });
  rule("status-stream-ended", "2.3: the stream of an ended request is its status", async () => {
    const stream = await fal.queue.streamStatus(ANIMATEDIFF, { requestId: await done("x"), logs: true });
    const seen = [];
    for await (const event of stream) seen.push(event);
    assert.deepEqual(seen.map(({ status, logs }) => [status, logs.length]), [["COMPLETED", 4]]);
  });
  rule("status-stream-type", "2.3: it is an event stream that nobody keeps", async (calls) => {
    const stream = await fal.queue.streamStatus(ANIMATEDIFF, { requestId: await done("x") });
    await stream.done();
    assert.match(calls.at(-1).headers.get("content-type"), /^text\/event-stream/);
    assert.equal(calls.at(-1).headers.get("cache-control"), "no-store");
  });
  rule("status-stream-unknown", "2.3: the stream of an unknown request is a 404 before it begins", async () => {
    const stream = await fal.queue.streamStatus(ANIMATEDIFF, { requestId: NOBODY });
    assert.equal((await failure(stream.done())).status, 404);
  });
  rule("status-stream-cancel", "2.3: a cancelled request ends its stream", async () => {
    const id = await submit("endless");
    const stream = await fal.queue.streamStatus(ANIMATEDIFF, { requestId: id });
    await until(id, "IN_PROGRESS");
    await cancel(id);
    assert.equal((await stream.done()).error_type, "client_cancelled");
  });
  rule("status-stream-token", "3: with connectionMode client it takes a token in place of the key", async () => {
    const stream = await fal.queue.streamStatus(ANIMATEDIFF, { requestId: await submit("x"), connectionMode: "client" });
    assert.equal((await stream.done()).status, "COMPLETED");
  }, { only: ["J3"] });

  // Result.

  rule("result-data", "0: the result is the bare output, its id comes from a header", async () => {
    const id = await done("x");
    const answer = await result(id);
    assert.deepEqual([answer.requestId, answer.data.seed, Object.keys(answer.data).sort()], [id, 42, ["seed", "video"]]);
  });
  rule("result-file", "0: a file has its four fields", async () => {
    const { video } = (await result(await done("x"))).data;
    assert.deepEqual([video.content_type, video.file_name, video.file_size], ["video/mp4", "video.mp4", 2060]);
  });
  rule("result-download", "4: a file's URL needs no key", async () => {
    const { video } = (await result(await done("x"))).data;
    const file = await fetch(video.url);
    assert.deepEqual([file.status, file.headers.get("content-type")], [200, "video/mp4"]);
    assert.equal((await file.arrayBuffer()).byteLength, video.file_size);
  });
  rule("result-again", "8: a result can be read again and is equal", async () => {
    const id = await done("x");
    assert.deepEqual(await result(id), await result(id));
  });
  rule("result-early", "2.4: a result that is not there yet is a 400, and is not repeated", async (calls) => {
    const error = await failure(result(await submit("held")));
    assert.deepEqual([error.status, error.body.detail, calls.length], [400, "Request is still in progress", 2]);
  });
  rule("result-response-alias", "2.1: /response is the result too", async () => {
    assert.equal((await (await raw(queueUrl(await done("x"), "/response"))).json()).seed, 42);
  });
  rule("result-unknown", "2.4: an unknown id is a 404", async () => {
    assert.deepEqual((await failure(result(NOBODY))).body, { status: "NOT_FOUND" });
  });
  rule("result-model-error", "6.1: a model's error is a 422 with a list", async (calls) => {
    const error = await failure(result(await done("fails ImageLoadError")), ValidationError);
    const [fault] = error.fieldErrors;
    assert.deepEqual([fault.type, fault.loc], ["image_load_error", ["body", "keyframe_0_image_url"]]);
    assert.equal(calls.at(-1).headers.get("x-fal-needs-retry"), "0");
  });
  rule("result-request-error", "6.2: a runner's error is a text with its type, also in a header", async (calls) => {
    const error = await failure(result(await done("fails RunnerFailed")));
    assert.deepEqual([error.status, error.body.error_type, typeof error.body.detail], [500, "runner_server_error", "string"]);
    assert.equal(calls.at(-1).headers.get("x-fal-error-type"), "runner_server_error");
  });
  rule("result-500-once", "2.6: a permanent failure is not repeated by the client", async (calls) => {
    const id = await done("fails GenerationFailed");
    const before = calls.length;
    assert.equal((await failure(result(id))).status, 500);
    assert.equal(calls.length - before, 1);
  });
  rule("result-cancelled", "2.2: a cancelled request's result is a 499, client_cancelled", async () => {
    const id = await submit("held");
    await cancel(id);
    await until(id, "COMPLETED");
    const error = await failure(result(id));
    assert.deepEqual([error.status, error.body.error_type], [499, "client_cancelled"]);
  });
  rule("result-start-timeout", "2.1: a start timeout is a 504 of type user, which is not repeated", async (calls) => {
    const id = await submit("held", { startTimeout: 1.1 });
    await until(id, "COMPLETED");
    const before = calls.length;
    const error = await failure(result(id));
    assert.deepEqual([error.status, error.timeoutType, error.isUserTimeout, calls.length - before], [504, "user", true, 1]);
  });

  // Subscribe. The code of fal's two pages is theirs, letter for letter; `console` is ours.

  const onThePage = (code) => {
    const printed = [];
    const console = { log: (line) => printed.push(line) };
    const AsyncFunction = Object.getPrototypeOf(async () => {}).constructor;
    return new AsyncFunction("fal", "console", code)(fal, console).then(() => printed);
  };
  rule("page-animatediff", "0: the page's code for animatediff-sparsectrl-lcm", async () => {
    const printed = await onThePage(`
const result = await fal.subscribe("fal-ai/animatediff-sparsectrl-lcm", {
  input: {
    prompt: "Drone footage, futuristic city at night, synthwave, vaporware, neon lights, highly detailed, masterpeice, high quality"
  },
  logs: true,
  onQueueUpdate: (update) => {
    if (update.status === "IN_PROGRESS") {
      update.logs.map((log) => log.message).forEach(console.log);
    }
  },
});
console.log(result.data);
console.log(result.requestId);`);
    assert.equal(printed.at(-2).video.content_type, "video/mp4");
    assert.match(printed.at(-1), UUID);
  });
  rule("page-controlnext", "0: the page's code for controlnext", async () => {
    const printed = await onThePage(`
const result = await fal.subscribe("fal-ai/controlnext", {
  input: {
    image_url: "https://storage.googleapis.com/falserverless/model_tests/musepose/ref.png",
    video_url: "https://storage.googleapis.com/falserverless/model_tests/musepose/dance.mp4"
  },
  logs: true,
  onQueueUpdate: (update) => {
    if (update.status === "IN_PROGRESS") {
      update.logs.map((log) => log.message).forEach(console.log);
    }
  },
});
console.log(result.data);
console.log(result.requestId);`);
    assert.equal(printed.at(-2).video.content_type, "video/mp4");
    assert.match(printed.at(-1), UUID);
  });
  rule("page-queue", "0: the pages' submit, status and result", async () => {
    const { request_id: requestId } = await fal.queue.submit("fal-ai/controlnext", {
      input: { image_url: "https://a.example/ref.png", video_url: "https://a.example/dance.mp4" },
      webhookUrl: "https://optional.webhook.url/for/results",
    });
    await until2(requestId);
    const seen = await fal.queue.status("fal-ai/controlnext", { requestId, logs: true });
    assert.equal(seen.status, "COMPLETED");
    assert.equal((await fal.queue.result("fal-ai/controlnext", { requestId })).requestId, requestId);
  });
  const until2 = async (requestId) => {
    while ((await status(requestId, true, CONTROLNEXT)).status !== "COMPLETED") await sleep(100);
  };
  rule("subscribe-updates", "2.6: the callback sees the states in order, logs always an array", async () => {
    const seen = [];
    await fal.subscribe(ANIMATEDIFF, { input: { prompt: "slow" }, logs: true, pollInterval: 50, onQueueUpdate: (update) => seen.push(update) });
    assert.equal(seen.at(-1).status, "COMPLETED");
    assert.ok(seen.some((update) => update.status === "IN_PROGRESS"));
    assert.ok(seen.every((update) => Array.isArray(update.logs)));
  });
  rule("subscribe-streaming", "2.3: mode streaming ends with every line once", async () => {
    const seen = [];
    const { data } = await fal.subscribe(ANIMATEDIFF, {
      input: { prompt: "x", seed: 5 }, logs: true, mode: "streaming", onQueueUpdate: (update) => seen.push(update),
    });
    assert.equal(data.seed, 5);
    assert.deepEqual(seen.at(-1).logs.map(({ message }) => message), STEPS);
  });
  rule("subscribe-on-enqueue", "0: onEnqueue gets the id", async () => {
    let id = null;
    const { requestId } = await fal.subscribe(ANIMATEDIFF, { input: { prompt: "x" }, pollInterval: 50, onEnqueue: (given) => (id = given) });
    assert.equal(requestId, id);
  });
  rule("subscribe-invalid", "6.3: an invalid input rejects at once, without a poll", async (calls) => {
    await failure(fal.subscribe(ANIMATEDIFF, { input: {} }), ValidationError);
    assert.equal(calls.length, 1);
  });
  rule("subscribe-failed", "6.3: a failed request runs through to COMPLETED, then raises", async () => {
    const seen = [];
    const work = fal.subscribe(ANIMATEDIFF, { input: { prompt: "fails ImageLoadError" }, pollInterval: 50, onQueueUpdate: (update) => seen.push(update) });
    assert.equal((await failure(work, ValidationError)).requestId, seen.at(-1).request_id);
    assert.deepEqual([seen.at(-1).status, seen.at(-1).error_type], ["COMPLETED", "image_load_error"]);
  });
  rule("subscribe-timeout", "2.5: the client's timeout cancels the request", async () => {
    let id = null;
    const work = fal.subscribe(ANIMATEDIFF, { input: { prompt: "endless" }, timeout: 500, pollInterval: 50, onEnqueue: (given) => (id = given) });
    await work.then(() => assert.fail("no error"), (error) => assert.match(error.message, /timed out/));
    assert.equal((await until(id, "COMPLETED")).error_type, "client_cancelled");
  });
  rule("subscribe-abort", "2.5: an abort signal stops the polling, not the request", async () => {
    const controller = new AbortController();
    let id = null;
    const work = fal.subscribe(ANIMATEDIFF, {
      input: { prompt: "slow" }, pollInterval: 50, abortSignal: controller.signal, onEnqueue: (given) => ((id = given), controller.abort()),
    });
    await work.catch(() => null);
    assert.equal((await until(id, "COMPLETED")).error, undefined);
  });

  // Cancel.

  rule("cancel-queued", "2.5: a waiting request is cancelled with a 202", async (calls) => {
    const id = await submit("held");
    await cancel(id);
    assert.equal(calls.at(-1).status, 202);
    assert.equal((await until(id, "COMPLETED")).error_type, "client_cancelled");
  });
  rule("cancel-running", "9.3: a running request that is cancelled reaches COMPLETED", async () => {
    const id = await submit("endless");
    await until(id, "IN_PROGRESS");
    await cancel(id);
    assert.equal((await until(id, "COMPLETED")).error_type, "client_cancelled");
  });
  rule("cancel-again", "2.5: a repeated cancel is answered as the first", async () => {
    const id = await submit("held");
    for (let k = 0; k < 3; k++) assert.equal((await (await raw(queueUrl(id, "/cancel"), { method: "PUT" })).json()).status, "CANCELLATION_REQUESTED");
  });
  rule("cancel-completed", "2.5: a completed request cannot be cancelled: 400", async () => {
    const error = await failure(cancel(await done("x")));
    assert.deepEqual([error.status, error.body], [400, { status: "ALREADY_COMPLETED" }]);
  });
  rule("cancel-unknown", "2.5: an unknown request is a 404", async () => {
    assert.deepEqual((await failure(cancel(NOBODY))).body, { status: "NOT_FOUND" });
  });

  // Run.

  rule("run-output", "3: run answers the output on the same connection, with the request's id", async (calls) => {
    const { data, requestId } = await fal.run(ANIMATEDIFF, { input: { prompt: "x", seed: 6 } });
    assert.deepEqual([data.seed, data.video.content_type, calls.length], [6, "video/mp4", 1]);
    assert.match(requestId, UUID);
  });
  rule("run-is-a-job", "issue 14: a run's job can be followed in the queue", async () => {
    const { data, requestId } = await fal.run(ANIMATEDIFF, { input: { prompt: "x" } });
    assert.equal((await status(requestId)).status, "COMPLETED");
    assert.deepEqual((await result(requestId)).data.seed, data.seed);
  });
  rule("run-get", "3: with method get the input is in the query, all of it as text", async () => {
    const { data } = await fal.run(ANIMATEDIFF, { input: { prompt: "x", seed: 8, num_inference_steps: 4 }, method: "get" });
    assert.equal(data.seed, 8);
  });
  rule("run-get-switch", "3: a boolean in a query is text", async () => {
    const input = { image_url: "https://a.example/i.png", video_url: "https://a.example/v.mp4", video_is_pose: true, seed: 9 };
    assert.equal((await fal.run(CONTROLNEXT, { input, method: "get" })).data.seed, 9);
  });
  rule("run-invalid", "6.1: a run's wrong value is a 422", async () => {
    assert.equal((await failure(fal.run(ANIMATEDIFF, { input: {} }), ValidationError)).getFieldErrors("prompt").length, 1);
  });
  rule("run-model-error", "6.1: a run that fails has its error on the same connection", async () => {
    const error = await failure(fal.run(ANIMATEDIFF, { input: { prompt: "fails ImageLoadError" } }), ValidationError);
    assert.match(error.requestId, UUID);
  });
  rule("run-request-error", "2.6: a run's 500 is not repeated", async (calls) => {
    assert.equal((await failure(fal.run(ANIMATEDIFF, { input: { prompt: "fails RunnerFailed" } }))).body.error_type, "runner_server_error");
    assert.equal(calls.length, 1);
  });
  rule("run-runner-lost", "2.6: a run that went through has no code on which the client repeats it", async (calls) => {
    const error = await failure(fal.run(ANIMATEDIFF, { input: { prompt: "fails RunnerDisconnected" } }));
    assert.deepEqual([error.status, error.body.error_type, calls.length], [500, "runner_disconnected", 1]);
  });
  rule("run-start-timeout", "3: a run takes a start timeout", async () => {
    const error = await failure(fal.run(ANIMATEDIFF, { input: { prompt: "held" }, startTimeout: 1.1 }));
    assert.deepEqual([error.status, error.isUserTimeout], [504, true]);
  });
  rule("run-unknown-path", "6.1: a path that an endpoint does not have is a 404", async () => {
    assert.equal((await failure(fal.run(`${ANIMATEDIFF}/no/such/path`, { input: { prompt: "x" } }))).status, 404);
  });
  rule("run-storage-settings", "3: a run takes storage settings", async () => {
    assert.match((await fal.run(ANIMATEDIFF, { input: { prompt: "x" }, storageSettings: { expiresIn: "1h" } })).requestId, UUID);
  });

  // Stream.

  rule("stream-last-is-output", "3: the last event is the complete output", async () => {
    const stream = await fal.stream(ANIMATEDIFF, { input: { prompt: "x", seed: 11 } });
    const output = await stream.done();
    assert.deepEqual([output.seed, output.video.file_size, output.partial], [11, 2060, undefined]);
  });
  rule("stream-progress", "issue 14: the events before it have the output's shape and the progress", async () => {
    const stream = await fal.stream(ANIMATEDIFF, { input: { prompt: "x", seed: 12 } });
    const seen = [];
    for await (const event of stream) seen.push(event);
    const partial = seen.slice(0, -1);
    assert.ok(partial.length >= 2 && partial.every((event) => event.partial && event.seed === 12 && event.video === null));
    assert.deepEqual(partial.slice(1).map(({ progress }) => progress.step.done), [1, 2, 3, 4]);
  });
  rule("stream-request-id", "3: a stream's id comes from the header, and its job is in the queue", async () => {
    const stream = await fal.stream(ANIMATEDIFF, { input: { prompt: "x" } });
    await stream.done();
    assert.equal((await status(stream.requestId)).status, "COMPLETED");
  });
  rule("stream-invalid", "3: an error before the stream is an error as any", async () => {
    const stream = await fal.stream(ANIMATEDIFF, { input: {} });
    assert.equal((await failure(stream.done(), ValidationError)).status, 422);
  });
  rule("stream-fails", "3: a stream whose job fails tells why, and does not end as if it were complete", async () => {
    const stream = await fal.stream(ANIMATEDIFF, { input: { prompt: "fails ImageLoadError" } });
    const seen = [];
    stream.on("data", (event) => seen.push(event));
    await failure(stream.done(), Error);
    assert.deepEqual([seen.at(-1).status, seen.at(-1).detail[0].type], [422, "image_load_error"]);
  });
  rule("stream-suffix", "1.1: an id that ends in /stream is not doubled", async () => {
    const stream = await fal.stream(`${ANIMATEDIFF}/stream`, { input: { prompt: "x", seed: 13 } });
    assert.equal((await stream.done()).seed, 13);
  });
  rule("stream-token", "3: connectionMode client takes a token, and sends no key", async () => {
    const stream = await fal.stream(ANIMATEDIFF, { input: { prompt: "x", seed: 14 }, connectionMode: "client" });
    assert.equal((await stream.done()).seed, 14);
  }, { only: ["J3"] });
  rule("stream-type", "2.3: a stream is an event stream that nobody keeps", async (calls) => {
    await (await fal.stream(ANIMATEDIFF, { input: { prompt: "x" } })).done();
    assert.match(calls[0].headers.get("content-type"), /^text\/event-stream/);
    assert.equal(calls[0].headers.get("cache-control"), "no-store");
  });

  // Realtime.

  const session = (handler = {}, id = ANIMATEDIFF) => {
    const arrived = [];
    let wake = () => {};
    const note = (kind) => (value) => (arrived.push({ kind, value }), wake());
    const connection = fal.realtime.connect(id, { throttleInterval: 0, onResult: note("result"), onError: note("error"), ...handler });
    const next = async () => {
      while (arrived.length === 0) await new Promise((woken) => (wake = woken));
      return arrived.shift();
    };
    return { ...connection, next, arrived };
  };
  const REALTIME = { only: ["J3"] };
  rule("realtime-many", "3: one connection, many requests, each answered in msgpack", async () => {
    const { send, next, close } = session();
    for (const seed of [1, 2, 3]) {
      send({ prompt: "x", seed });
      assert.equal((await next()).value.seed, seed);
    }
    close();
  }, REALTIME);
  rule("realtime-request-id", "3: a result carries its input's request_id", async () => {
    const { send, next, close } = session();
    send({ prompt: "x", request_id: "mine" });
    assert.equal((await next()).value.request_id, "mine");
    close();
  }, REALTIME);
  rule("realtime-error-in-band", "3: an error is an ApiError, and the connection goes on", async () => {
    const { send, next, close } = session();
    send({ prompt: "x", num_inference_steps: 0, request_id: "bad" });
    const { kind, value } = await next();
    assert.deepEqual([kind, value.status, value.body.request_id, value.body.detail[0].type], ["error", 400, "bad", "greater_than_equal"]);
    send({ prompt: "fails ImageLoadError" });
    assert.match((await next()).value.message, /^image_load_error/);
    send({ prompt: "x", seed: 4 });
    assert.equal((await next()).value.seed, 4);
    close();
  }, REALTIME);
  rule("realtime-latest-wins", "3: of requests that come meanwhile the newest is answered", async () => {
    const { send, next, close } = session();
    send({ prompt: "slow", seed: 0 });
    await sleep(150);
    for (let seed = 1; seed < 20; seed++) send({ prompt: "x", seed });
    const seeds = [(await next()).value.seed];
    while (seeds.at(-1) !== 19) seeds.push((await next()).value.seed);
    assert.ok(seeds.length <= 4, `${seeds}`);
    close();
  }, REALTIME);
  rule("realtime-buffering", "3: maxBuffering keeps so many", async () => {
    const { send, next, close } = session({ maxBuffering: 60 });
    send({ prompt: "x", seed: 0 });
    await next();
    for (let seed = 1; seed < 6; seed++) send({ prompt: "x", seed });
    const seeds = [];
    while (seeds.length < 5) seeds.push((await next()).value.seed);
    assert.deepEqual(seeds, [1, 2, 3, 4, 5]);
    close();
  }, REALTIME);
  rule("realtime-json", "3: a custom encoding may send text, and is answered in JSON", async () => {
    const { send, next, close } = session({ encodeMessage: JSON.stringify, decodeMessage: (data) => JSON.parse(data) });
    send({ prompt: "x", seed: 21 });
    assert.equal((await next()).value.seed, 21);
    close();
  }, REALTIME);
  rule("realtime-no-such-endpoint", "3: an endpoint without realtime refuses the handshake", async () => {
    const { send, next } = session({}, CONTROLNEXT);
    send({});
    assert.equal((await next()).kind, "error");
  }, REALTIME);
  rule("realtime-token-provider", "3: a token provider's token is taken", async () => {
    const tokenProvider = async (app) => {
      assert.equal(app, `${ANIMATEDIFF}/realtime`);
      return (await raw("https://rest.fal.ai/tokens/realtime", { method: "POST", body: JSON.stringify({ allowed_apps: [ANIMATEDIFF], duration: 120 }) })).json();
    };
    const { send, next, close } = session({ tokenProvider, tokenExpirationSeconds: 120 });
    send({ prompt: "x", seed: 22 });
    assert.equal((await next()).value.seed, 22);
    close();
  }, REALTIME);
  rule("realtime-unauthorized", "3: on a bad token the client goes idle, and asks for another with its next request", async () => {
    let asked = 0;
    const good = () => raw("https://rest.fal.ai/tokens/", { method: "POST", body: JSON.stringify({ allowed_apps: [ANIMATEDIFF] }) });
    const tokenProvider = async () => (asked++ === 0 ? "nonsense" : (await good()).json());
    const { send, next } = session({ tokenProvider });
    send({ prompt: "x" });
    assert.equal((await next()).value.status, 1008); // the refused connection's end
    await sleep(50);
    send({ prompt: "x", seed: 23 });
    assert.deepEqual([(await next()).value.seed, asked], [23, 2]);
  }, { only: ["J3"], withKeys: true });

  // Tokens and keys.

  const tokenFor = (body, headers) => raw("https://rest.fal.ai/tokens/", { method: "POST", body: JSON.stringify(body), headers });
  rule("token-bare-string", "3: a token is a bare JSON string", async () => {
    const answer = await tokenFor({ allowed_apps: ["animatediff-sparsectrl-lcm"], token_expiration: 120 });
    assert.match(answer.headers.get("content-type"), /^application\/json/);
    assert.equal(typeof (await answer.json()), "string");
  });
  rule("token-realtime-route", "3: tokens/realtime takes a duration", async () => {
    const answer = await raw("https://rest.fal.ai/tokens/realtime", { method: "POST", body: JSON.stringify({ allowed_apps: [ANIMATEDIFF], duration: 60 }) });
    assert.equal(typeof (await answer.json()), "string");
  });
  rule("token-not-kept", "3: nobody keeps a token's answer", async () => {
    assert.equal((await tokenFor({ allowed_apps: ["x"] })).headers.get("cache-control"), "no-store");
  });
  rule("token-invalid", "ours: a token for too long, or for no app, is a 422", async () => {
    for (const body of [{}, { allowed_apps: [] }, { allowed_apps: ["x"], token_expiration: 1e6 }, { allowed_apps: ["x"], scope: "all" }])
      assert.equal((await tokenFor(body)).status, 422);
  });
  const withToken = async (token, id = ANIMATEDIFF) =>
    (await raw(`https://queue.fal.run/${id}/requests/${NOBODY}/status?fal_jwt_token=${token}`, { headers: { authorization: "" } })).status;
  rule("token-in-place-of-key", "9.12: queue paths take a token in place of the key", async () => {
    assert.equal(await withToken(await (await tokenFor({ allowed_apps: [ANIMATEDIFF] })).json()), 404);
  }, { withKeys: true });
  rule("token-of-another-app", "ours: a token is refused elsewhere", async () => {
    assert.equal(await withToken(await (await tokenFor({ allowed_apps: ["controlnext"] })).json()), 403);
  }, { withKeys: true });
  rule("token-forged", "ours: a token that was changed is a 401", async () => {
    const token = await (await tokenFor({ allowed_apps: [ANIMATEDIFF] })).json();
    assert.deepEqual([await withToken(`${token}x`), await withToken("nonsense"), await withToken("")], [401, 401, 401]);
  }, { withKeys: true });
  rule("token-needs-key", "ours: who has no key gets no token", async () => {
    assert.equal((await tokenFor({ allowed_apps: ["x"] }, { authorization: "Key nonsense" })).status, 401);
  }, { withKeys: true });
  rule("key-missing", "6.2: without a key a call is a 401, and is not repeated", async (calls) => {
    const error = await failure(clientWith(null).queue.submit(ANIMATEDIFF, { input: { prompt: "x" } }));
    assert.deepEqual([error.status, error.body.error_type, calls.length], [401, "unauthorized", 1]);
  }, { withKeys: true });
  rule("key-wrong", "6.2: so is one with a wrong key", async () => {
    assert.equal((await failure(clientWith("a:b").queue.submit(ANIMATEDIFF, { input: { prompt: "x" } }))).status, 401);
  }, { withKeys: true });
  rule("key-scope", "ours: a key that may only read is a 403 on submit", async () => {
    const error = await failure(clientWith(keys?.reader).queue.submit(ANIMATEDIFF, { input: { prompt: "x" } }));
    assert.deepEqual([error.status, error.body.error_type], [403, "forbidden"]);
  }, { withKeys: true });
  rule("key-of-another", "ours: another key's request is unknown", async () => {
    const error = await failure(clientWith(keys?.other).queue.status(ANIMATEDIFF, { requestId: await submit("held") }));
    assert.deepEqual([error.status, error.body], [404, { status: "NOT_FOUND" }]);
  }, { withKeys: true });
  rule("key-bearer", "2.1: a key may come as Bearer", async () => {
    assert.equal((await raw(queueUrl(NOBODY, "/status"), { headers: { authorization: `Bearer ${keys?.own}` } })).status, 404);
  }, { withKeys: true });

  // The proxy, and pages in browsers.

  const HEADERS = ["authorization", "content-type", "accept", "x-fal-target-url", "x-fal-queue-priority", "x-fal-runner-hint"];
  HEADERS.push("x-fal-request-timeout", "x-fal-object-lifecycle-preference", "x-fal-object-lifecycle", "x-fal-store-io", "x-fal-no-retry");
  rule("proxy-preflight", "1.3: a page's preflight allows every header that the client sends", async () => {
    for (const method of ["GET", "POST", "PUT", "DELETE"]) {
      const answer = await fetch(`${base}/api/fal/proxy`, {
        method: "OPTIONS",
        headers: { origin: "http://localhost:3000", "access-control-request-method": method, "access-control-request-headers": HEADERS.join(",") },
      });
      const allowed = answer.headers.get("access-control-allow-headers").toLowerCase().split(/, ?/);
      assert.equal(answer.status, 200);
      assert.deepEqual(HEADERS.filter((name) => !allowed.includes(name)), []);
      assert.ok(answer.headers.get("access-control-allow-methods").includes(method));
    }
  }, { only: ["J1"] });
  rule("proxy-exposes", "1.3: a page may read the headers that the client reads", async () => {
    const headers = { origin: "http://localhost:3000", "x-fal-target-url": queueUrl(NOBODY, "/status") };
    const answer = await fetch(`${base}/api/fal/proxy`, { headers });
    const exposed = answer.headers.get("access-control-expose-headers");
    for (const name of ["x-fal-request-id", "x-fal-request-timeout-type", "x-fal-error-type"]) assert.ok(exposed.includes(name), name);
    assert.ok(["*", "http://localhost:3000"].includes(answer.headers.get("access-control-allow-origin")));
  }, { only: ["J1"] });
  rule("proxy-targets", "1.3: any other target is a 400, Invalid request", async () => {
    for (const target of ["https://evil.example/", "nonsense", "", "https://queue.fal.run.evil.example/", "file:///etc/passwd", null]) {
      const answer = await fetch(`${base}/api/fal/proxy`, { headers: target === null ? {} : { "x-fal-target-url": target } });
      assert.deepEqual([answer.status, await answer.json()], [400, "Invalid request"]);
    }
  }, { only: ["J1"] });
  rule("proxy-delete", "1.3: DELETE is taken too, and answered in fal's shape", async () => {
    const answer = await fetch(`${base}/api/fal/proxy`, { method: "DELETE", headers: { "x-fal-target-url": queueUrl(NOBODY) } });
    assert.equal(typeof (await answer.json()).detail, "string");
  }, { only: ["J1"] });
  rule("proxy-alpha-host", "issue 14: rest.alpha.fal.ai is rest.fal.ai", async () => {
    const headers = { ...(keys ? { authorization: `Key ${keys.own}` } : {}), "x-fal-target-url": "https://rest.alpha.fal.ai/tokens/" };
    const answer = await fetch(`${base}/api/fal/proxy`, { method: "POST", headers, body: '{"allowed_apps":["x"]}' });
    assert.equal(typeof (await answer.json()), "string");
  }, { only: ["J1"] });
  rule("hosts-alpha", "issue 14: Host rest.alpha.fal.ai is rest.fal.ai", async () => {
    const headers = keys ? { authorization: `Key ${keys.own}` } : {};
    const answer = await fetch("https://rest.alpha.fal.ai/tokens/", { method: "POST", headers, body: '{"allowed_apps":["x"]}' });
    assert.equal(typeof (await answer.json()), "string");
  }, { only: ["J3"] });

  // Webhooks, checked as fal's documentation tells receivers to.

  const isSigned = async ({ headers, body }) => {
    const { keys: published } = await (await raw("https://rest.fal.ai/.well-known/jwks.json")).json();
    const hash = createHash("sha256").update(body).digest("hex");
    const names = ["request-id", "user-id", "timestamp"].map((name) => headers[`x-fal-webhook-${name}`]);
    const message = Buffer.from([...names, hash].join("\n"));
    const signature = Buffer.from(headers["x-fal-webhook-signature"], "hex");
    return published.some((key) => verify(null, message, createPublicKey({ key, format: "jwk" }), signature));
  };
  const delivered = async (name, prompt) => {
    const { url, delivery } = hook(`/${name}?of=${recipe}`);
    const id = await submit(prompt, { webhookUrl: url });
    return { id, ...(await delivery) };
  };
  rule("webhook-ok", "5: the end of a request is told, with its output", async () => {
    const { id, body } = await delivered("ok", "x");
    const told = JSON.parse(body);
    assert.deepEqual([told.request_id, told.gateway_request_id, told.status, told.payload.seed], [id, id, "OK", 42]);
  });
  rule("webhook-error", "5: a failure is told as the result would be", async () => {
    const told = JSON.parse((await delivered("error", "fails ImageLoadError")).body);
    assert.deepEqual([told.status, told.payload.detail[0].type], ["ERROR", "image_load_error"]);
    assert.match(told.error, /422/);
  });
  rule("webhook-signature", "5: its signature is one of our published keys'", async () => {
    const { id, headers, body } = await delivered("signed", "x");
    assert.ok(await isSigned({ headers, body }));
    assert.equal(headers["x-fal-webhook-request-id"], id);
    assert.ok(Math.abs(Date.now() / 1000 - Number(headers["x-fal-webhook-timestamp"])) < 300);
  });
  rule("webhook-tampered", "5: a body, id or time that was changed is found out", async () => {
    const { headers, body } = await delivered("tampered", "x");
    assert.ok(!(await isSigned({ headers, body: Buffer.concat([body, Buffer.from(" ")]) })));
    for (const name of ["request-id", "user-id", "timestamp"])
      assert.ok(!(await isSigned({ headers: { ...headers, [`x-fal-webhook-${name}`]: "1" }, body })));
  });
  rule("webhook-file-url", "5: the URLs in a webhook can be fetched", async () => {
    const told = JSON.parse((await delivered("file", "x")).body);
    assert.equal((await fetch(told.payload.video.url)).status, 200);
  });
  rule("webhook-invalid-input", "2.1: an input that was refused is told too", async () => {
    const { url, delivery } = hook("/invalid");
    await fal.queue.submit(ANIMATEDIFF, { input: {}, webhookUrl: url });
    const told = JSON.parse((await delivery).body);
    assert.deepEqual([told.status, told.payload.detail[0].loc], ["ERROR", ["body", "prompt"]]);
  });
  rule("jwks", "5: the public keys are Ed25519 keys that Node can import", async () => {
    const answer = await raw("https://rest.fal.ai/.well-known/jwks.json");
    const { keys: published } = await answer.json();
    assert.ok(published.length >= 1 && published.every(({ kty, crv }) => kty === "OKP" && crv === "Ed25519"));
    for (const key of published) assert.equal(createPublicKey({ key, format: "jwk" }).asymmetricKeyType, "ed25519");
  });

  // What holds for all that was called above. These rules are checked last.

  rule("every-answer-has-an-id", "9.1: x-fal-request-id is on every answer of ours", async () => {
    const bare = everything.filter(({ headers, method }) => method !== "OPTIONS" && !UUID.test(headers.get("x-fal-request-id") ?? ""));
    assert.deepEqual(bare.map(({ method, url }) => `${method} ${url}`), []);
    assert.ok(everything.length > 1.3 * chosen.length);
  });
  rule("every-answer-is-direct", "9.11: nothing redirects", async () => {
    assert.deepEqual(everything.filter(({ status }) => status >= 300 && status < 400 && status !== 304), []);
  });
  rule("every-code-is-safe", "2.6: no answer has a code on which a client repeats a call that went through", async () => {
    const unsafe = everything.filter(({ status }) => [408, 409, 429, 502, 503].includes(status));
    assert.deepEqual(unsafe.map(({ url, status }) => [url, status]), []);
  });
}

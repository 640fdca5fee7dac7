// What @fal-ai/client relies on when it uploads: rules as in rules.mjs, of section 4.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";

const ANIMATEDIFF = "fal-ai/animatediff-sparsectrl-lcm";
const text = (content, name = "hello.txt") => new File([content], name, { type: "text/plain" });
const picture = (content = "not really") => new Blob([content], { type: "image/png" });
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");
const noise = (size) => Uint8Array.from({ length: size }, (_, i) => (i * 7919) >> 3);

export default function define(rule, { fal, raw, failure, keys, base, clientWith, ValidationError }) {
  const withKey = (who) => ({ headers: { authorization: `Key ${keys[who]}` } });
  const put = (url, body, type = "text/plain") => fetch(url, { method: "PUT", body, headers: { "content-type": type } });
  const initiate = async (asked = {}, form = "initiate") => {
    const body = JSON.stringify({ content_type: "text/plain", file_name: "hello.txt", ...asked });
    const url = `https://rest.fal.ai/storage/upload/${form}?storage_type=fal-cdn-v3`;
    return (await raw(url, { method: "POST", body })).json();
  };

  rule("upload-read-back", "4: a file is read back at once, with its type and without a key", async () => {
    const answer = await fetch(await fal.storage.upload(text("Hello")));
    assert.deepEqual([answer.status, answer.headers.get("content-type"), await answer.text()], [200, "text/plain", "Hello"]);
  });
  rule("upload-calls", "4: it is initiated with the key, and sent to the URL that the answer names", async (calls) => {
    const url = await fal.storage.upload(text("Hello"));
    assert.deepEqual(calls.map((call) => [call.method, call.status]), [["POST", 200], ["PUT", 200]]);
    assert.ok(calls[1].url.startsWith(`${url}?`));
  });
  rule("upload-name", "4: the URL ends with the file's name", async () => {
    assert.match(await fal.storage.upload(text("x", "notes.txt")), /\/files\/b\/[0-9a-f]{32}\/notes\.txt$/);
    assert.match(await fal.storage.upload(text("x", "../../日本 notes.TXT")), /\/files\/b\/[0-9a-f]{32}\/notes\.txt$/);
  });
  rule("upload-nameless", "4: a blob without a name is called by the time, and its type", async () => {
    assert.match(await fal.storage.upload(picture()), /\/\d+\.png$/);
  });
  rule("upload-without-type", "4: a blob without a type is bytes", async () => {
    const answer = await fetch(await fal.storage.upload(new Blob([noise(10)])));
    assert.equal(answer.headers.get("content-type"), "application/octet-stream");
    assert.deepEqual(new Uint8Array(await answer.arrayBuffer()), noise(10));
  });
  rule("upload-empty", "4: a file may be empty", async () => {
    const answer = await fetch(await fal.storage.upload(text("")));
    assert.deepEqual([answer.status, await answer.text()], [200, ""]);
  });
  rule("upload-bytes", "4: all bytes come back as they were", async () => {
    const bytes = Buffer.alloc(3_000_001, noise(1009));
    const answer = await fetch(await fal.storage.upload(new Blob([bytes], { type: "video/mp4" })));
    assert.equal(sha256(Buffer.from(await answer.arrayBuffer())), sha256(bytes));
    assert.equal(answer.headers.get("content-type"), "video/mp4");
  });
  rule("upload-at-once", "4: several uploads at once get a URL each", async () => {
    const urls = await Promise.all([1, 2, 3, 4, 5, 6].map((n) => fal.storage.upload(text(`file ${n}`))));
    assert.equal(new Set(urls).size, 6);
    const contents = await Promise.all(urls.map(async (url) => (await fetch(url)).text()));
    assert.deepEqual(contents, [1, 2, 3, 4, 5, 6].map((n) => `file ${n}`));
  });
  rule("upload-lifecycle", "4: a file expires when its lifecycle says", async () => {
    for (const [expiresIn, most] of [["immediate", 60], [90, 90], ["1h", 3600]]) {
      const answer = await fetch(await fal.storage.upload(text("x"), { lifecycle: { expiresIn } }));
      const age = Number(/max-age=(\d+)/.exec(answer.headers.get("cache-control"))[1]);
      assert.ok(age <= most && age > most - 30, `${expiresIn}: ${age}`);
    }
  });
  rule("upload-hidden", "4: a hidden file is as if absent, but for its owner", async () => {
    const url = await fal.storage.upload(text("x"), { lifecycle: { initialAcl: { default: "hide" } } });
    assert.deepEqual([(await fetch(url)).status, (await fetch(url, withKey("other"))).status], [404, 404]);
    assert.equal(await (await fetch(url, withKey("own"))).text(), "x");
  }, { withKeys: true });
  rule("upload-forbidden", "4: a forbidden file is an error, but for its owner and those of a rule", async () => {
    const rules = [{ user: keys?.reader.split(":")[0], decision: "allow" }];
    const url = await fal.storage.upload(text("x"), { lifecycle: { initialAcl: { default: "forbid", rules } } });
    assert.deepEqual([(await fetch(url)).status, (await fetch(url, withKey("other"))).status], [403, 403]);
    assert.deepEqual([(await fetch(url, withKey("own"))).status, (await fetch(url, withKey("reader"))).status], [200, 200]);
  }, { withKeys: true });
  rule("upload-acl-without-keys", "4: an open service shows a hidden file to nobody", async () => {
    const url = await fal.storage.upload(text("x"), { lifecycle: { initialAcl: { default: "hide" } } });
    assert.equal((await fetch(url)).status, 404);
  });
  rule("upload-wrong-key", "6.2: an upload with a wrong key is a 401, which is not repeated", async (calls) => {
    assert.equal((await failure(clientWith("a:b").storage.upload(text("x")))).status, 401);
    assert.equal(calls.length, 1);
  }, { withKeys: true });
  rule("upload-scope", "ours: a key that may only read uploads nothing", async () => {
    const error = await failure(clientWith(keys?.reader).storage.upload(text("x")));
    assert.deepEqual([error.status, error.body.error_type], [403, "forbidden"]);
  }, { withKeys: true });

  // Files in an input.

  const input = (url) => ({ input: { prompt: "x", seed: 1, keyframe_0_image_url: url, keyframe_0_index: 0 } });
  rule("auto-upload", "4: a Blob in the input is uploaded, and its URL submitted", async (calls) => {
    const done = await fal.subscribe(ANIMATEDIFF, { ...input(picture()), pollInterval: 100 });
    assert.ok(done.data.video.url);
    const first = calls.slice(0, 3).map((call) => [call.method, call.url.split("?")[0].replace(/.*\/(initiate|files\/b|animatediff).*/, "$1")]);
    assert.deepEqual(first, [["POST", "initiate"], ["PUT", "files/b"], ["POST", "animatediff"]]);
  });
  rule("auto-upload-nested", "4: so is each one in lists and objects", async (calls) => {
    const nested = { list: [picture("a"), { deep: picture("b") }] };
    await fal.queue.submit(ANIMATEDIFF, { input: { ...input(picture("c")).input, nested } });
    assert.equal(calls.filter((call) => call.method === "PUT" && call.status === 200).length, 3);
  });
  rule("auto-upload-run", "4: and before a run", async (calls) => {
    const done = await fal.run(ANIMATEDIFF, input(picture()));
    assert.equal(done.data.seed, 1);
    assert.equal(calls.filter((call) => call.method === "PUT").length, 1);
  });
  rule("input-data-uri", "0: a data URI is no upload, and arrives as it is", async (calls) => {
    await fal.queue.submit(ANIMATEDIFF, input("data:image/png;base64,aGk="));
    assert.equal(calls.length, 1);
  });
  rule("input-of-ours", "ours: a file of ours is known by its URL, and one that is gone is told at once", async () => {
    const url = await fal.storage.upload(picture());
    await fal.queue.submit(ANIMATEDIFF, input(url));
    const error = await failure(fal.queue.submit(ANIMATEDIFF, input(url.replace(/b\/.{4}/, "b/0000"))), ValidationError);
    assert.equal(error.getFieldErrors("keyframe_0_image_url")[0].type, "file_download_error");
  });
  rule("input-hidden", "ours: another key's hidden file is no input", async () => {
    const url = await fal.storage.upload(picture(), { lifecycle: { initialAcl: { default: "hide" } } });
    await fal.queue.submit(ANIMATEDIFF, input(url));
    const error = await failure(clientWith(keys?.other).queue.submit(ANIMATEDIFF, input(url)), ValidationError);
    assert.equal(error.getFieldErrors("keyframe_0_image_url")[0].type, "file_download_error");
  }, { withKeys: true });
  rule("result-hidden", "2.1: the access rules of storageSettings hold for the files that a request makes", async () => {
    const { data } = await fal.subscribe(ANIMATEDIFF, {
      input: { prompt: "x" },
      pollInterval: 100,
      storageSettings: { initialAcl: { default: "hide" } },
    });
    assert.equal((await fetch(data.video.url)).status, 404);
    if (keys) assert.equal((await fetch(data.video.url, withKey("own"))).status, 200);
  });

  // The wire beneath.

  rule("upload-url-without-key", "9.12: an upload URL asks for no key", async () => {
    const { upload_url: url, file_url: file } = await initiate();
    assert.equal((await put(url, "Hello")).status, 200);
    assert.equal(await (await fetch(file)).text(), "Hello");
  });
  rule("upload-url-is-bound", "ours: to its file, its type, and what was sent first", async () => {
    const { upload_url: url, file_url: file } = await initiate();
    assert.equal((await put(url, "<script>", "text/html")).status, 403);
    assert.equal((await put(url.slice(0, -5), "x")).status, 403);
    assert.equal((await put(file, "x")).status, 403);
    assert.deepEqual([(await put(url, "x")).status, (await put(url, "x")).status, (await put(url, "y")).status], [200, 200, 403]);
    const other = await initiate({ file_size: 3 });
    assert.deepEqual([(await put(other.upload_url, "four")).status, (await put(other.upload_url, "abc")).status], [413, 200]);
  });
  rule("upload-parts-answer", "9.9: a part's answer is JSON with its number and etag", async () => {
    const { upload_url: url, file_url: file } = await initiate({}, "initiate-multipart");
    const [path, query] = url.split("?");
    const answers = [await put(`${path}/2?${query}`, " world"), await put(`${path}/1?${query}`, "Hello")];
    const parts = await Promise.all(answers.map((answer) => answer.json()));
    assert.match(answers[0].headers.get("content-type"), /^application\/json/);
    assert.deepEqual(parts.map((part) => part.partNumber), [2, 1]);
    assert.equal(answers[0].headers.get("etag"), `"${parts[0].etag}"`);
    assert.equal((await fetch(file)).status, 404);
    const complete = (list) => fetch(`${path}/complete?${query}`, { method: "POST", body: JSON.stringify({ parts: list }) });
    assert.equal((await complete([parts[0], { ...parts[1], etag: "0" }])).status, 400);
    assert.equal((await complete(parts)).status, 200);
    assert.equal(await (await fetch(file)).text(), "Hello world");
  });
  rule("file-ranges", "ours: parts of a file, one and several, and none behind its end", async () => {
    const url = await fal.storage.upload(text("0123456789"));
    const part = async (range) => fetch(url, { headers: { range } });
    for (const [range, body, where] of [["bytes=2-4", "234", "2-4"], ["bytes=7-", "789", "7-9"], ["bytes=-3", "789", "7-9"]]) {
      const answer = await part(range);
      assert.deepEqual([answer.status, await answer.text(), answer.headers.get("content-range")], [206, body, `bytes ${where}/10`]);
    }
    const several = await part("bytes=0-1,8-9");
    assert.match(several.headers.get("content-type"), /^multipart\/byteranges; boundary=/);
    assert.match(await several.text(), /content-range: bytes 0-1\/10\r\n\r\n01\r\n.*content-range: bytes 8-9\/10\r\n\r\n89\r\n/s);
    const behind = await part("bytes=10-");
    assert.deepEqual([behind.status, behind.headers.get("content-range")], [416, "bytes */10"]);
  });
  rule("file-conditions", "ours: a file that has not changed is not sent again", async () => {
    const url = await fal.storage.upload(text("x"));
    const etag = (await fetch(url, { method: "HEAD" })).headers.get("etag");
    assert.equal((await fetch(url, { headers: { "if-none-match": etag } })).status, 304);
    assert.equal((await fetch(url, { headers: { "if-match": '"other"' } })).status, 412);
  });
  rule("file-is-no-page", "ours: what a browser could run is a download of bytes, in a sandbox", async () => {
    for (const [type, content] of [["text/html", "<script>"], ["image/svg+xml", "<svg onload=''/>"], ["text/javascript", "1"]]) {
      const answer = await fetch(await fal.storage.upload(new File([content], "x.html", { type })));
      assert.equal(answer.headers.get("content-type"), "application/octet-stream");
      assert.match(answer.headers.get("content-disposition"), /^attachment/);
      assert.equal(answer.headers.get("x-content-type-options"), "nosniff");
      assert.match(answer.headers.get("content-security-policy"), /sandbox.*default-src 'none'/);
    }
    const shown = await fetch(await fal.storage.upload(picture()));
    assert.match(shown.headers.get("content-disposition"), /^inline/);
  });
  rule("file-for-pages", "ours: pages of any origin read files, and may upload", async () => {
    const { upload_url: url, file_url: file } = await initiate();
    const origin = "http://localhost:3000";
    const asks = { origin, "access-control-request-method": "PUT", "access-control-request-headers": "content-type" };
    assert.equal((await fetch(url, { method: "OPTIONS", headers: asks })).status, 200);
    const sent = await fetch(url, { method: "PUT", body: "x", headers: { origin, "content-type": "text/plain" } });
    assert.ok([origin, "*"].includes(sent.headers.get("access-control-allow-origin")));
    assert.ok([origin, "*"].includes((await fetch(file, { headers: { origin } })).headers.get("access-control-allow-origin")));
  });
  rule("cdn-prefix", "1.4: files are under /cdn as well", async () => {
    const url = new URL(await fal.storage.upload(text("x")));
    assert.equal(await (await fetch(`${base}/cdn${url.pathname}`)).text(), "x");
  });
}

// SPDX-License-Identifier: Apache-2.0
// OPENAI_BASE_URL=... OPENAI_API_KEY=... node client.mjs MODEL
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 0 });
const model = process.argv[2];
const prompt = "The old house";
const request = { model, max_tokens: 8, temperature: 0 };

const models = (await client.models.list()).data.map((entry) => entry.id);
const whole = await client.completions.create({ ...request, prompt });
let streamed = "";
for await (const chunk of await client.completions.create({ ...request, prompt, stream: true })) {
  streamed += chunk.choices[0].text;
}
const messages = [{ role: "user", content: prompt }];
const chat = await client.chat.completions.create({ ...request, messages });

let refused = 200;
try {
  await client.withOptions({ apiKey: "wrong-0123456789-ABCDEFGHIJ" }).models.list();
} catch (error) {
  refused = error.status;
}
console.log(
  JSON.stringify({
    models,
    whole: whole.choices[0].text,
    streamed,
    chat: chat.choices[0].message.content,
    refused,
  }),
);
